"""The names that blog tutorials use, made to run.

    from llama2 import LLama2Model
    model = LLama2Model.from_pretrained(path)
    print(model.generate("Once upon a time", max_length=50))

Tutorials call classes that exist in no library (`docs/misconceptions.md` lists what else they get wrong).
Here they are thin clothes over `llama2.load`: text in gives text out, ids in give ids out. Where a
tutorial asks for what cannot be, the sensible thing is done and said once, as a warning.
"""

import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.checkpoint.store import save
from llama2.errors import RequestError, TokenizerMissing
from llama2.llm import LLM, load
from llama2.tasks import labels, texts
from llama2.tokenizer.tokenizer import Tokenizer


class Encoding(dict[str, Any]):
    """What a tokenizer call returns: `input_ids` and `attention_mask`, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def to(self, device: str | torch.device) -> "Encoding":
        return Encoding({name: value.to(device) for name, value in self.items()})


class Output(dict[str, Any]):
    """What a model call returns: `logits`, and `loss` where labels were given."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, key: str | int) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class LLama2Tokenizer:
    """`LLama2Tokenizer.from_pretrained(path)`; call it on texts to get padded id tensors."""

    def __init__(self, tokenizer: Tokenizer, *, model_max_length: int):
        self.tokenizer = tokenizer
        self.model_max_length = model_max_length
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        ids = (tokenizer.pad_id, tokenizer.eos_id, 0)
        self.pad_token_id = next(token_id for token_id in ids if token_id is not None)
        self.vocab_size = tokenizer.n_vocab
        self.bos_token, self.eos_token, self.pad_token = (
            None if token_id is None else tokenizer.vocabulary.pieces[token_id]
            for token_id in (self.bos_token_id, self.eos_token_id, self.pad_token_id)
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "LLama2Tokenizer":
        """Load the tokenizer of a checkpoint (folder, file or hub name)."""
        from llama2.checkpoint import hub, store
        from llama2.tokenizer.formats import load_tokenizer

        found = hub.resolve(path)
        return cls(load_tokenizer(found), model_max_length=store.read_config(found).context_length)

    def __len__(self) -> int:
        return self.tokenizer.n_vocab

    def tokenize(self, text: str) -> list[str]:
        """Return the pieces of a text."""
        return [self.tokenizer.vocabulary.pieces[token_id] for token_id in self.tokenizer.encode(text)]

    def encode(self, text: str, *, add_special_tokens: bool = True, return_tensors: str | None = None) -> Any:
        """Return the ids of a text, with the beginning-of-sequence token unless told otherwise."""
        ids = self.tokenizer.encode(text, bos=add_special_tokens and self.bos_token_id is not None)
        return torch.tensor([ids]) if return_tensors == "pt" else ids

    def decode(self, ids: Tensor | Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        ids = ids.flatten().tolist() if isinstance(ids, Tensor) else ids
        return self.tokenizer.decode(ids, special=not skip_special_tokens)

    def batch_decode(self, rows: Tensor | Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
    ) -> Encoding:
        """Return ids and mask; padded on the right, cut at max_length only if truncation is asked for."""
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self.encode(each, add_special_tokens=add_special_tokens) for each in texts]
        limit = self.model_max_length if max_length is None else max_length
        if truncation:
            rows = [row[:limit] for row in rows]
        width = max(map(len, rows))
        if not padding and return_tensors == "pt" and any(len(row) < width for row in rows):
            raise RequestError("texts of different lengths make no tensor; pass padding=True")
        width = max(width, limit) if padding == "max_length" else width if padding else 0
        masks = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        rows = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        if return_tensors == "pt":
            return Encoding(input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks))
        if isinstance(text, str):
            return Encoding(input_ids=rows[0], attention_mask=masks[0])
        return Encoding(input_ids=rows, attention_mask=masks)


class LLama2Model(nn.Module):
    """`LLama2Model.from_pretrained(path)`: a PyTorch module that also takes text."""

    def __init__(self, llm: LLM):
        super().__init__()
        self.transformer = llm.model
        self.config = llm.config
        self.llm = llm

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> "LLama2Model":
        """Load a checkpoint (folder, file or hub name); options are those of `llama2.load`."""
        return cls(load(path, **options)).eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Write the weights, and the tokenizer if there is one, as a Hugging Face folder."""
        try:
            tokenizer = self.llm.tokenizer
        except TokenizerMissing:
            tokenizer = None
        save(self.transformer, path, tokenizer=tokenizer)

    @property
    def device(self) -> torch.device:
        return self.transformer.tok_embeddings.weight.device

    def forward(
        self,
        input_ids: Tensor | Encoding,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        """Return logits [B T V], and the mean next-token loss if labels [B T] are given (-100: not counted).

        Padding must stand on the right, where it cannot be seen; the mask is accepted and not needed.
        """
        if isinstance(input_ids, Encoding):
            attention_mask, input_ids = input_ids["attention_mask"], input_ids["input_ids"]
        if attention_mask is not None and (attention_mask.diff(dim=-1) > 0).any():
            raise RequestError("attention_mask has padding on the left; pad on the right, as our tokenizer does")
        logits = self.transformer(input_ids)
        if labels is None:
            return Output(logits=logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return Output(loss=loss, logits=logits)

    def generate(
        self,
        inputs: str | Sequence[str] | Tensor | Encoding | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        num_return_sequences: int = 1,
        do_sample: bool | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> Any:
        """Continue texts (giving whole texts, prompt included) or ids [B T] (giving ids, prompt included).

        max_length counts the prompt, max_new_tokens does not. Ids are continued greedily unless do_sample or a
        sampling option says otherwise, as `transformers` does; several sequences of one prompt are sampled.
        Other options: those of `LLM.generate`.
        """
        inputs = input_ids if inputs is None else inputs
        if inputs is None:
            raise RequestError("generate needs a text or input_ids")
        if isinstance(inputs, Encoding):
            attention_mask = inputs["attention_mask"]
            inputs = torch.as_tensor(inputs["input_ids"])
        for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
            if value is not None and value < 1:
                raise RequestError(f"{name}={value} must be at least 1")
        wants_greedy = (
            do_sample is False
            or options.get("temperature") == 0
            or (do_sample is None and isinstance(inputs, Tensor) and not _samples(options))
        )
        if num_return_sequences > 1 and wants_greedy:
            _say_once("greedy decoding has one answer; several were asked for, so they are sampled")
            options = {name: value for name, value in options.items() if name != "temperature"}
            wants_greedy = False
        if wants_greedy:
            options = {**options, "temperature": 0.0}
        if eos_token_id is not None:
            options = {**options, "stop_ids": (eos_token_id,)}
        lengths = _Lengths(max_length, max_new_tokens)
        if isinstance(inputs, Tensor):
            rows = self._continue_ids(inputs, attention_mask, lengths, num_return_sequences, options)
            pad_ids = (pad_token_id, self.llm.tokenizer.pad_id, self.llm.tokenizer.eos_id, 0)
            return _right_padded(rows, next(each for each in pad_ids if each is not None)).to(inputs.device)
        return self._continue_texts(inputs, lengths, num_return_sequences, options)

    def predict_sentiment(self, text: str, **options: Any) -> str:
        """Return "positive" or "negative"; `llama2.tasks.sentiment`, whose options these are, says how surely."""
        return labels.sentiment(self.llm, text, **options).label

    def translate(self, text: str, *, target_language: str, **options: Any) -> str:
        """Return a text in another language, "es" or "Spanish"; options are those of `llama2.tasks.translate`."""
        return texts.translate(self.llm, text, target_language=target_language, **options).text

    def _continue_texts(self, texts: str | Sequence[str], lengths: "_Lengths", n: int, options: dict[str, Any]) -> Any:
        answers = []
        for text in [texts] if isinstance(texts, str) else texts:
            n_prompt = len(self.llm.tokenizer.encode(text, bos=self.llm.tokenizer.bos_id is not None))
            new = self.llm.generate(text, max_new_tokens=lengths.room_after(n_prompt), n=n, **options)
            answers.append(text + new if n == 1 else [text + each for each in new])
        return answers[0] if isinstance(texts, str) else answers

    def _continue_ids(
        self, rows: Tensor, mask: Tensor | None, lengths: "_Lengths", n: int, options: dict[str, Any]
    ) -> list[list[int]]:
        keep = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.bool()
        answers: list[list[int]] = []
        for row, is_real in zip(rows, keep, strict=True):
            prompt = row[is_real].tolist()
            answers += self.llm.continue_ids(prompt, max_new_tokens=lengths.room_after(len(prompt)), n=n, **options)
        return answers


class _Lengths:
    """max_length counts the prompt; max_new_tokens does not, and wins."""

    def __init__(self, max_length: int | None, max_new_tokens: int | None):
        self.max_length, self.max_new_tokens = max_length, max_new_tokens

    def room_after(self, n_prompt: int) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return 256
        if n_prompt >= self.max_length:
            _say_once(
                f"max_length={self.max_length} counts the prompt, whose {n_prompt} tokens leave no room; "
                f"{self.max_length} new tokens are written instead: use max_new_tokens"
            )
            return self.max_length
        return self.max_length - n_prompt


def preprocess_text(text: str) -> str:
    """Return the text in Unicode's composed form without space around it, and otherwise as it is.

    Tutorials delete punctuation and stop-words here. That ruins text for a language model, which learnt to
    read and write all of it (`docs/misconceptions.md`).
    """
    return unicodedata.normalize("NFC", text).strip()


def _samples(options: dict[str, Any]) -> bool:
    return any(name in options for name in ("temperature", "top_p", "top_k", "min_p"))


def _right_padded(rows: list[list[int]], pad_id: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, UserWarning, stacklevel=4)


LLaMAForCausalLM = LLama2Model
LLaMATokenizer = LLama2Tokenizer
