"""What makes a model's inputs of pictures and sounds: settings beside the tokenizer's."""

from __future__ import annotations

import json
from pathlib import Path

from quantflow.paths import write_text
from quantflow.tokenizers.reading import optional_json

PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "image_processor_config.json", "audio_processor_config.json", "feature_extractor_config.json",
)  # fmt: skip


def export_processor(source: Path, target: Path) -> None:
    """Writes them as they are, without what names remote code. Raises ModelError."""
    for name in PROCESSOR_FILES:
        settings = optional_json(source / name)
        settings.pop("auto_map", None)
        if settings:
            text = json.dumps(settings, indent=2, ensure_ascii=False)
            write_text(target / name, text + "\n")
