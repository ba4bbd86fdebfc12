"""Train the bundled demo model: a 7 M parameter Llama on the documentation that `corpus.py`
extracts.

    python benchmarks/demo_model/train.py --corpus build/corpus --output build/demo_model --minutes
    75

Makes a byte-level BPE tokenizer with a chat template, trains with Muon (hidden matrices; Jordan et
al. 2024) and AdamW (embedding, norms) for the given time, and writes a bf16 checkpoint that
transformers loads, with `training.json` beside it: data, tokens, seconds, held-out perplexity and
bits per byte.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"
VOCABULARY = 4096
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{"
    " message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt"
    " %}<|im_start|>assistant\n{% endif %}"
)


def documents(path: Path) -> list[str]:
    return [d.strip() for d in path.read_text(encoding="utf-8").split(SEPARATOR) if d.strip()]


def make_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def as_chat(document: str) -> str:
    """The document as an answer to a question about its title, so that the chat template's tokens
    are trained too."""
    title, _, body = document.partition("\n")
    return (
        "<|im_start|>user\nTell me about"
        f" {title.strip()[:80]}<|im_end|>\n<|im_start|>assistant\n{body.strip()}<|im_end|>\n"
    )


def token_stream(
    tokenizer: PreTrainedTokenizerFast, documents: list[str], seed: int, chat: float
) -> torch.Tensor:
    rng = random.Random(seed)
    shuffled = rng.sample(documents, len(documents))
    ids: list[int] = []
    for text in shuffled:
        ids += tokenizer(as_chat(text) if rng.random() < chat else text)["input_ids"] + [
            tokenizer.eos_token_id
        ]
    return torch.tensor(ids, dtype=torch.long)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[str],
    length: int,
    windows: int,
) -> dict[str, float]:
    """Perplexity and bits per byte on windows of `length` tokens; every token but each window's
    first is predicted."""
    ids = [i for text in documents for i in tokenizer(text)["input_ids"]]
    nll, tokens, data = 0.0, 0, 0
    for start in range(0, min(len(ids) - length, windows * length), length):
        window = torch.tensor([ids[start : start + length]])
        logits = model(window).logits.float().log_softmax(-1)
        nll -= logits[0, :-1].gather(1, window[0, 1:, None]).sum().item()
        tokens += length - 1
        data += len(
            tokenizer.decode(ids[start + 1 : start + length], skip_special_tokens=True).encode()
        )
    return {
        "perplexity": math.exp(nll / tokens),
        "bits_per_byte": nll / math.log(2) / data,
        "tokens": tokens,
        "bytes": data,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    training = documents(args.corpus / "train.txt")
    held_out = documents(args.corpus / "eval.txt")
    tokenizer = make_tokenizer(training)
    data = token_stream(tokenizer, training, args.seed, chat=0.08)
    print(f"{len(data)} training tokens", flush=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    hidden = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    muon = torch.optim.Muon(
        hidden, lr=0.02, momentum=0.95, weight_decay=0.02, adjust_lr_fn="original"
    )
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    base = [(o, group["lr"]) for o in (muon, adam) for group in o.param_groups]
    compiled = torch.compile(model)
    generator = torch.Generator().manual_seed(args.seed)
    began, step, seen, smooth = time.monotonic(), 0, 0, 0.0
    while True:
        progress = (time.monotonic() - began) / (args.minutes * 60)
        if progress >= 1:
            break
        # Short windows first, the full context for the last fifth; warm up, hold, then decay
        # linearly to zero.
        length, batch = (512, 12) if progress < 0.8 else (1024, 6)
        factor = min(1.0, (step + 1) / 40, max(0.0, (1 - progress) / 0.6))
        for optimizer, lr in base:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        starts = torch.randint(len(data) - length - 1, (batch,), generator=generator)
        inputs = torch.stack([data[s : s + length] for s in starts])
        labels = torch.stack([data[s + 1 : s + length + 1] for s in starts])
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + inputs.numel()
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        if step % 25 == 0:
            seconds = time.monotonic() - began
            print(
                f"step {step} {seconds:.0f}s loss {smooth:.4f} {seen / seconds:.0f} tok/s",
                flush=True,
            )
        if step % 400 == 0:
            print("held out", evaluate(model, tokenizer, held_out, 512, 16), flush=True)
    seconds = time.monotonic() - began
    model = model.to(torch.bfloat16)
    shutil.rmtree(args.output, ignore_errors=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    # transformers 5 writes a class name that version 4 does not have.
    saved = args.output / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(saved.read_text()).items() if k != "backend"}
    saved.write_text(
        json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n"
    )
    # What is reported is what is shipped: the rounded weights, at the full context.
    result = evaluate(
        LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32),
        tokenizer,
        held_out,
        1024,
        10_000,
    )
    record = {
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "steps": step,
        "tokens": seen,
        "epochs": round(seen / len(data), 2),
        "training_bytes": len("".join(training).encode()),
        "torch": torch.__version__,
        "held_out": result,
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
