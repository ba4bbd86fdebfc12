"""The models that are served, as Anthropic's clients list them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from quantflow.serve.replies import ModelCard
from quantflow.serve.wire import Object


def model_info(card: ModelCard) -> Object:
    return {
        "type": "model",
        "id": card.id,
        "display_name": card.id,
        "created_at": datetime.fromtimestamp(card.created, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": card.max_model_len,
        "max_tokens": card.max_model_len,
    }


def model_page(cards: Sequence[ModelCard]) -> Object:
    """All of them."""
    return {
        "data": [model_info(card) for card in cards],
        "has_more": False,
        "first_id": cards[0].id,
        "last_id": cards[-1].id,
    }
