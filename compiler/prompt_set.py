"""The prompt set: short questions whose greedy answers source and artefact must share, and texts that both must cut
into the same tokens.

The source is asked through transformers, the artefact through ONNX Runtime GenAI, its texts cut as devices cut them: so
the tokenizer, the rotary tables and the KV cache of the real runtime are part of what is compared. The artefact gets
the source's own prompt tokens; a tokenizer of another model shows in `tokenizer_match`, not as a poor answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np

from model_registry.chat_tokenizer import ChatTokenizer
from model_registry.manifest import canonical_bytes, sha256

ANSWER_TOKENS = 4
PROMPTS = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "How many days has a week? Answer with a number.",
    "What is 2 + 3? Answer with a number.",
    "Translate to Spanish: good morning.",
    "Translate to French: thank you.",
    "Name the opposite of hot.",
    "Name the colour of a clear sky.",
    "Complete: one, two, three,",
    "Write one sentence about the sea.",
    "Write a Python function that adds two numbers.",
    "Give the JSON object with the key a and the value 1.",
)
TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "def f(x):\n    return x ** 2  # squared\n\n",
    "Größe, naïve café, Ελλάδα, 日本語, 🙂",
    topics.topics["assert"] + topics.topics["floating"] + topics.topics["strings"],
    "don't WE'RE 1234567 3.14  \t tabs and  spaces   ",
)


@dataclass(frozen=True)
class Answers:
    """Tokens of each text, the digest of vocabulary and merges (empty where there are none to see), tokens of each
    prompt with its chat template, and the greedy answers to them."""

    texts: list[list[int]]
    vocabulary: str
    prompts: list[list[int]]
    answers: list[list[int]]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(vars(self)))

    @classmethod
    def load(cls, path: Path) -> Answers:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_bytes()))


def ask_source(model: Any, tokenizer: Any) -> Answers:
    """The answers of a transformers model in float32; at most `ANSWER_TOKENS` each."""
    import torch

    prompts, answers = [], []
    for prompt in PROMPTS:
        answer: list[int] = []
        text = _as_chat(tokenizer, prompt)
        tokens = tokenizer(text, add_special_tokens=text == prompt).input_ids
        ids, past = torch.tensor([tokens]), None
        with torch.inference_mode():
            while len(answer) < ANSWER_TOKENS:
                output = model(ids, past_key_values=past, use_cache=True)
                past = output.past_key_values
                answer.append(int(output.logits[0, -1].argmax()))
                ids = torch.tensor([[answer[-1]]])
        prompts.append([int(token) for token in tokens])
        answers.append(answer)
    texts = [[int(token) for token in tokenizer(text).input_ids] for text in TEXTS]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return Answers(texts, _vocabulary(backend.to_str()) if backend is not None else "", prompts, answers)


def _vocabulary(tokenizer_json: str) -> str:
    """Which tokens there are and how they are merged; the rest of a tokenizer shows in how it cuts texts."""
    model = json.loads(tokenizer_json)["model"]
    return sha256(canonical_bytes({"vocab": model.get("vocab"), "merges": model.get("merges")}))


def _as_chat(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def ask_artefact(folder: Path, prompts: list[list[int]]) -> Answers:
    """The answers of the artefact in `folder` to the same prompt tokens, on the CPU, one token at a time."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.clear_providers()  # a graph for a GPU is asked on the CPU, too
    model = genai.Model(config)
    tokenizer = ChatTokenizer(folder)
    answers = []
    for tokens in prompts:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(tokens) + ANSWER_TOKENS)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array([tokens], dtype=np.int32))
        answer: list[int] = []
        while not generator.is_done() and len(answer) < ANSWER_TOKENS:
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
        answers.append(answer)
    texts = [tokenizer.encode(text) for text in TEXTS]
    return Answers(texts, _vocabulary(tokenizer.to_json()), prompts, answers)


def prompt_figures(source: Answers, artefact: Answers) -> dict[str, float]:
    """`exact_match`: share of prompts answered alike; `tokenizer_match`: share of texts cut into the same tokens, 0 for
    another vocabulary or other merges.

    An answer that an end token cut short matches if the source says the same up to and including that token.
    """
    pairs = list(zip(source.answers, artefact.answers, strict=True))
    alike = [bool(found) and wanted[: len(found)] == found for wanted, found in pairs]
    has_same_words = source.vocabulary in ("", artefact.vocabulary)
    same_text = [has_same_words and a == b for a, b in zip(source.texts, artefact.texts, strict=True)]
    return {"exact_match": float(np.mean(alike)), "tokenizer_match": float(np.mean(same_text))}
