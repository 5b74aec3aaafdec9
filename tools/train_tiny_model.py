"""Train the tiny Llama that the tests and the demo run on.

The text is what every machine with Python has: the sources of the standard library, and chat turns made of
its docstrings. The result is a Hugging Face folder (weights in float16, BPE tokenizer, chat template) small
enough to commit, with logits as peaked as those of a real model.

    python tools/train_tiny_model.py --minutes 60 --out tests/models/tiny-llama

A fixed share of the files is held out; the loss on them is printed and stored in `training.json`.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 2048
CONTEXT = 4096
SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "<|bos|>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def library_files() -> list[Path]:
    """Sources of the standard library without its tests, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "__pycache__"}
    return [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]


def held_out(path: Path) -> bool:
    return zlib.crc32(path.name.encode()) % 20 == 0


def chat_turns(path: Path, source: str) -> str:
    """Question and answer pairs: a dotted name, and the docstring that explains it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    turns = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        doc = ast.get_docstring(node)
        if doc and 20 < len(doc) < 1500:
            turns.append(f"<|user|>\nWhat does {path.stem}.{node.name} do?<|end|>\n<|assistant|>\n{doc}<|end|>\n")
    chats = ["".join(turns[i : i + 4]) for i in range(0, len(turns), 4)]
    return "".join(f"<|bos|><|system|>\nYou explain the Python standard library.<|end|>\n{c}" for c in chats)


def read_corpus() -> tuple[list[str], list[str]]:
    train, held = [], []
    for path in library_files():
        source = path.read_text(encoding="utf-8", errors="ignore")
        (held if held_out(path) else train).append(
            f"<|bos|># {path.stem}.py\n{source}<|end|>\n{chat_turns(path, source)}"
        )
    return train, held


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tok: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in tok.backend_tokenizer.encode_batch(texts)])


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=SPECIALS.index("<|bos|>"),
        eos_token_id=SPECIALS.index("<|end|>"),
        pad_token_id=SPECIALS.index("<|pad|>"),
    )
    return LlamaForCausalLM(config)


def sample_batch(data: np.ndarray, rng: np.random.Generator, length: int, rows: int) -> torch.Tensor:
    starts = rng.integers(0, len(data) - length - 1, rows)
    return torch.from_numpy(np.stack([data[s : s + length + 1] for s in starts]).astype(np.int64))


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def save(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, out: Path, facts: dict[str, object]) -> None:
    half = build_model()
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(out)
    tok.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(args.seed)

    train_texts, held_texts = read_corpus()
    tok = train_tokenizer(train_texts)
    train, held = encode(tok, train_texts), encode(tok, held_texts)
    bytes_per_token = sum(len(t.encode()) for t in held_texts) / len(held)
    model = build_model()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(train)} training tokens, {len(held)} held out", flush=True)

    decay = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    held_batch = sample_batch(held, np.random.default_rng(1), 1024, 8)
    start, step, tokens, next_report = time.monotonic(), 0, 0, 0.0
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        rate = 3e-3 * min(1, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Long rows last: positions up to the context are seen, at the price of few steps.
        length, rows = (512, 8) if done < 0.8 else (2048, 2) if done < 0.95 else (CONTEXT, 1)
        loss = loss_of(model, sample_batch(train, rng, length, rows))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, tokens = step + 1, tokens + length * rows
        if done >= next_report or step == 1:
            with torch.inference_mode():
                held_loss = float(loss_of(model, held_batch))
            facts = {
                "seed": args.seed, "minutes": round(done * args.minutes, 1), "steps": step, "tokens": tokens,
                "parameters": parameters, "loss_nats_per_token": round(held_loss, 4),
                "loss_nats_per_byte": round(held_loss / bytes_per_token, 4),
            }  # fmt: skip
            print(json.dumps(facts), flush=True)
            save(model, tok, args.out, facts)
            next_report += 1 / 30
    with torch.inference_mode():
        held_loss = float(loss_of(model, held_batch))
    facts |= {"minutes": args.minutes, "steps": step, "tokens": tokens, "loss_nats_per_token": round(held_loss, 4),
              "loss_nats_per_byte": round(held_loss / bytes_per_token, 4)}  # fmt: skip
    print(json.dumps(facts), flush=True)
    save(model, tok, args.out, facts)


if __name__ == "__main__":
    main()
