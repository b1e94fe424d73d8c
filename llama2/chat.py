"""A conversation becomes tokens here and nowhere else, so what was trained is what is served.

    llama2    [INST] and <<SYS>> written as text, each turn encoded alone; source:
              facebookresearch/llama, llama/generation.py, chat_completion
    llama3    header tokens around each role; source: meta-llama/llama-models, chat_format.py
    template  the checkpoint's own Jinja template, run in a sandbox

`Rendered.trainable` marks the answers of the assistant and the token that ends each of them.
Knows nothing of models, files of dialogues or generation.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama2.errors import ChatError, TokenizerError, did_you_mean
from llama2.tokenizer.template import Template
from llama2.tokenizer.tokenizer import Tokenizer, check_text
from llama2.tokenizer.vocabulary import SPACE, UNKNOWN

FORMATS = ("llama2", "llama3", "template")
ROLES = ("system", "user", "assistant", "ipython", "tool")

DEFAULT_SYSTEM_PROMPT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
"""arXiv:2307.09288 table 31. Meta made it optional in August 2023: nothing here adds it by itself."""

_LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and what."""

    role: str
    content: str


Conversation = tuple[Message, ...]
Runner = Callable[[Conversation, bool], str]


@dataclass(frozen=True)
class Rendered:
    """A conversation as ids; `trainable[i]` says that `tokens[i]` is what the assistant was to write."""

    tokens: list[int]
    trainable: list[bool]


def conversation(messages: Iterable[Message | Mapping[str, Any]]) -> Conversation:
    """Return checked messages; each may be a Message or a dict of "role" and "content". Raises ChatError."""
    checked = tuple(_message(message, i) for i, message in enumerate(messages))
    if not checked:
        raise ChatError("the conversation is empty; wanted at least one message of the user")
    return checked


def _message(message: Message | Mapping[str, Any], i: int) -> Message:
    if isinstance(message, Mapping):
        if set(message) != {"role", "content"}:
            raise ChatError(f"message {i} has the keys {sorted(map(str, message))}; wanted 'role' and 'content'")
        message = Message(message["role"], message["content"])
    if not isinstance(message, Message):
        raise ChatError(
            f"message {i} is a {type(message).__name__}; wanted a Message or a dict of 'role' and 'content'"
        )
    if message.role not in ROLES:
        hint = did_you_mean(str(message.role), ROLES)
        raise ChatError(f"message {i} has the role {message.role!r}; wanted one of {', '.join(ROLES)}{hint}")
    try:
        check_text(message.content)
    except TokenizerError as error:
        raise ChatError(f"message {i}: {error}") from None
    return message


def detect_format(tokenizer: Tokenizer) -> str:
    """Return the format that a tokenizer's chat template speaks for, or without one its vocabulary."""
    template = tokenizer.chat_template or ""
    if template:
        is_llama3, is_llama2 = "<|start_header_id|>" in template, "[INST]" in template and "<<SYS>>" in template
    else:
        is_llama3 = {"<|start_header_id|>", "<|eot_id|>"} <= tokenizer.special_tokens.keys()
        is_llama2 = tokenizer.vocabulary.kind == "spm"
    return "llama3" if is_llama3 else "llama2" if is_llama2 else "template"


def stop_ids(tokenizer: Tokenizer, format: str | None = None) -> tuple[int, ...]:
    """Return the ids that end a turn of the assistant."""
    names = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>") if _format(tokenizer, format) == "llama3" else ()
    found = [tokenizer.special_tokens[name] for name in names if name in tokenizer.special_tokens]
    known = [tokenizer.eos_id, *tokenizer.vocabulary.stop_ids]
    return tuple(dict.fromkeys(found + [token_id for token_id in known if token_id is not None]))


def render(
    messages: Iterable[Message | Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    format: str | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> Rendered:
    """Return a conversation as ids, with the assistant's answers marked.

    `format` is one of FORMATS, or None to go by the tokenizer. With `add_generation_prompt` the ids end where
    an answer begins and, being a prompt, nothing is marked; with `continue_final_message` they end where the last
    message, the beginning of an answer, is to go on. Raises ChatError where roles, tags or special names do not
    allow it.
    """
    checked = conversation(messages)
    if continue_final_message:
        return _render_open(checked, tokenizer, _format(tokenizer, format))
    if add_generation_prompt and checked[-1].role == "assistant":
        raise ChatError("the last message is the assistant's, so there is nothing to answer; end with the user's")
    match _format(tokenizer, format):
        case "llama2":
            rendered = _render_llama2(checked, tokenizer, marked=not add_generation_prompt)
        case "llama3":
            rendered = _render_llama3(checked, tokenizer, add_generation_prompt)
        case _:
            rendered = _render_template(checked, tokenizer, add_generation_prompt)
    assert len(rendered.tokens) == len(rendered.trainable)
    return rendered


def _format(tokenizer: Tokenizer, format: str | None) -> str:
    if format is not None and format not in FORMATS:
        raise ChatError(f"format={format!r} is not one of {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
    return format or detect_format(tokenizer)


def _render_open(messages: Conversation, tokenizer: Tokenizer, format: str) -> Rendered:
    """Return a conversation whose last message, the beginning of an answer, goes on."""
    *before, last = messages
    if last.role != "assistant" or not before or not last.content.strip():
        raise ChatError("only an answer that has begun can be continued; end with words of the assistant")
    if format == "template":
        ids = _template_ids(messages, tokenizer, _open_text)
    else:
        if format == "llama2":
            _llama2_turns(messages)  # refuses roles and tags
        asked = render(before, tokenizer, format=format, add_generation_prompt=True)
        ids = asked.tokens + tokenizer.encode(last.content.lstrip())
    return Rendered(ids, [False] * len(ids))


# Llama 2


def _render_llama2(messages: Conversation, tokenizer: Tokenizer, *, marked: bool) -> Rendered:
    bos, eos = _end_ids(tokenizer)
    rendered = Rendered([], [])
    turns = _llama2_turns(messages)
    for user, answer in turns:
        question = f"[INST] {user.strip()} [/INST]"
        if answer is None:
            ids = tokenizer.encode(question)
            _extend(rendered, [bos, *ids], [False] * (1 + len(ids)))
            continue
        text = f"{question} {answer.strip()} "
        ids = tokenizer.encode(text)
        marks = _llama2_marks(ids, question, text, tokenizer) if marked else [False] * len(ids)
        _extend(rendered, [bos, *ids, eos], [False, *marks, marked])
    return rendered


def _llama2_marks(ids: list[int], question: str, text: str, tokenizer: Tokenizer) -> list[bool]:
    if tokenizer.vocabulary.remove_extra_spaces:
        question, text = (" ".join(part for part in whole.split(" ") if part) for whole in (question, text))
    begins = len(question.encode("utf-8"))
    return [start >= begins for start in _token_starts(ids, text, tokenizer)]


def _extend(rendered: Rendered, tokens: list[int], trainable: list[bool]) -> None:
    rendered.tokens.extend(tokens)
    rendered.trainable.extend(trainable)


def _end_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise ChatError("the Llama 2 format needs a BOS and an EOS, and the vocabulary does not name both")
    return tokenizer.bos_id, tokenizer.eos_id


def _llama2_turns(messages: Conversation) -> list[tuple[str, str | None]]:
    """Fold the system message into the first question; return pairs of question and answer."""
    for i, message in enumerate(messages):
        for tag in _LLAMA2_TAGS:
            if tag in message.content:
                raise ChatError(
                    f"message {i} contains {tag!r}; special tags are not allowed as part of the prompt: take it out"
                )
    texts = [message.content for message in messages]
    roles = [message.role for message in messages]
    if roles[0] == "system" and len(roles) > 1:
        texts[:2] = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}"]
        roles = roles[1:]
    for i, role in enumerate(roles):
        wanted = ("user", "assistant")[i % 2]
        if role != wanted:
            raise ChatError(
                f"the roles are {', '.join(message.role for message in messages)}; the Llama 2 format wants an "
                f"optional system, then user and assistant in turns ({role!r} stands where {wanted!r} belongs)"
            )
    answers: list[str | None] = [*texts[1::2]]
    return list(zip(texts[::2], answers + [None] * (len(texts) % 2), strict=True))


def _token_starts(ids: Sequence[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """Return at which byte of the text each token begins."""
    # SentencePiece's dummy space is in the tokens and not in the text
    for dummy in (b" ", b""):
        starts = _aligned(ids, text.encode("utf-8"), dummy, tokenizer)
        if starts is not None:
            return starts
    raise ChatError(
        f"the tokens of {text[:40]!r} do not add up to it: this tokenizer changes text before encoding it, so answers "
        "cannot be told from questions; train with another tokenizer"
    )


def _aligned(ids: Sequence[int], data: bytes, dummy: bytes, tokenizer: Tokenizer) -> list[int] | None:
    """Lay tokens over bytes, or return None where they do not fit; `dummy` is taken off the first."""
    starts, at = [], 0
    for i, token_id in enumerate(ids):
        starts.append(at)
        if tokenizer.vocabulary.types[token_id] == UNKNOWN:
            at += _unknown_bytes(data[at:], tokenizer)
            continue
        piece = tokenizer.token_bytes(token_id)
        if i == 0:
            if not piece.startswith(dummy):
                return None
            piece = piece[len(dummy) :]
        if data[at : at + len(piece)] != piece:
            return None
        at += len(piece)
    return starts


def _unknown_bytes(data: bytes, tokenizer: Tokenizer) -> int:
    """Return the length of the characters in front that the vocabulary has no piece for: one token stands for all."""
    n_bytes = 0
    for char in data.decode("utf-8", errors="ignore"):
        if (SPACE if char == " " else char) in tokenizer.vocabulary.ids:
            break
        n_bytes += len(char.encode("utf-8"))
    return n_bytes


# Llama 3


def _render_llama3(messages: Conversation, tokenizer: Tokenizer, add_generation_prompt: bool) -> Rendered:
    begin, end = _special_id(tokenizer, "<|begin_of_text|>"), _special_id(tokenizer, "<|eot_id|>")
    rendered = Rendered([begin], [False])
    for message in messages:
        header = _llama3_header(message.role, tokenizer)
        content = [*tokenizer.encode(message.content.strip()), end]
        marked = message.role == "assistant" and not add_generation_prompt
        _extend(rendered, header + content, [False] * len(header) + [marked] * len(content))
    if add_generation_prompt:
        header = _llama3_header("assistant", tokenizer)
        _extend(rendered, header, [False] * len(header))
    return rendered


def _llama3_header(role: str, tokenizer: Tokenizer) -> list[int]:
    start, end = _special_id(tokenizer, "<|start_header_id|>"), _special_id(tokenizer, "<|end_header_id|>")
    name = "ipython" if role == "tool" else role
    return [start, *tokenizer.encode(name), end, *tokenizer.encode("\n\n")]


def _special_id(tokenizer: Tokenizer, name: str) -> int:
    if name not in tokenizer.special_tokens:
        raise ChatError(f"the vocabulary has no {name}, which the Llama 3 format needs; choose format='llama2'")
    return tokenizer.special_tokens[name]


# The checkpoint's own template


def _render_template(messages: Conversation, tokenizer: Tokenizer, add_generation_prompt: bool) -> Rendered:
    ids = _template_ids(messages, tokenizer, lambda turns, run: run(turns, add_generation_prompt))
    if add_generation_prompt:
        return Rendered(ids, [False] * len(ids))
    run = _runner(tokenizer)
    text = run(messages, False)
    spans = list(_answer_spans(messages, text, run))
    return Rendered(ids, _marks(ids, text, spans, tokenizer))


def _template_ids(
    messages: Conversation, tokenizer: Tokenizer, text_of: Callable[[Conversation, Runner], str]
) -> list[int]:
    if not tokenizer.chat_template:
        raise ChatError("the tokenizer has no chat_template; choose format='llama2' or 'llama3', or add one beside it")
    run = _runner(tokenizer)
    _refuse_special_names(messages, tokenizer)
    ids = tokenizer.encode(text_of(messages, run), special=True)
    special = set(tokenizer.special_tokens.values())
    harmless = tokenizer.encode(text_of(_disarmed(messages, tokenizer), run), special=True)
    if [i for i in ids if i in special] != [i for i in harmless if i in special]:
        raise ChatError("the chat template makes special tokens out of what the messages say; change their text")
    return ids


def _open_text(messages: Conversation, run: Runner) -> str:
    """Return a conversation's text up to the end of the words of its last message."""
    text, words = run(messages, False), messages[-1].content
    for said in (words, words.lstrip(), words.strip()):  # a template may take spaces away
        if (at := text.rfind(said)) >= 0:
            return text[: at + len(said)]
    raise ChatError("the chat template changes the last message, so that it cannot be continued")


def _runner(tokenizer: Tokenizer) -> Runner:
    vocabulary = tokenizer.vocabulary
    roles = {role: getattr(vocabulary, f"{role}_id") for role in ("bos", "eos", "unk", "pad")}
    names = {f"{role}_token": "" if i is None else vocabulary.pieces[i] for role, i in roles.items()}
    template = Template(tokenizer.chat_template or "")

    def run(messages: Conversation, add_generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return template.render(messages=turns, add_generation_prompt=add_generation_prompt, **names)

    return run


def _refuse_special_names(messages: Conversation, tokenizer: Tokenizer) -> None:
    for i, message in enumerate(messages):
        for name in tokenizer.special_tokens:
            if name in message.content:
                raise ChatError(
                    f"message {i} contains {name!r}, the name of a special token; a chat template cannot keep it text: "
                    "take it out"
                )


def _disarmed(messages: Conversation, tokenizer: Tokenizer) -> Conversation:
    """Replace every character that a special name begins or ends with, so that none can arise from the messages."""
    edges = {name[0] for name in tokenizer.special_tokens} | {name[-1] for name in tokenizer.special_tokens}
    table = {ord(char): "\ue000" for char in edges}
    return tuple(Message(message.role, message.content.translate(table)) for message in messages)


def _answer_spans(messages: Conversation, text: str, run: Runner) -> Iterator[tuple[int, int]]:
    """Yield where each answer begins and ends in the text, as bytes, by rendering what comes before it."""
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = run(messages[:i], True) if i else ""
        upto = run(messages[: i + 1], False)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise ChatError(
                f"the chat template changes earlier turns when later ones follow (seen at message {i}), so answers "
                "cannot be marked for training; choose format='llama2' or 'llama3'"
            )
        yield len(before.encode("utf-8")), len(upto.encode("utf-8"))


def _marks(ids: list[int], text: str, spans: list[tuple[int, int]], tokenizer: Tokenizer) -> list[bool]:
    marks = [False] * len(ids)
    starts = _token_starts_with_names(ids, text, tokenizer)
    stops = set(stop_ids(tokenizer, "template"))
    for begin, end in spans:
        inside = [i for i, start in enumerate(starts) if begin <= start < end]
        ends = [i for i in inside if ids[i] in stops]
        # what a template writes after the end of a turn is not the assistant's
        for i in inside:
            marks[i] = not ends or i <= ends[-1]
    return marks


def _token_starts_with_names(ids: list[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """Return at which byte each token begins, special names and the dummy space after each of them allowed for."""
    names = {token_id: name.encode("utf-8") for name, token_id in tokenizer.special_tokens.items()}
    data, starts, at = text.encode("utf-8"), [], 0
    segment: list[int] = []
    for token_id in [*ids, None]:
        if token_id is not None and token_id not in names:
            segment.append(token_id)
            continue
        end = len(data) if token_id is None else data.find(names[token_id], at)
        assert end >= 0, (token_id, text)
        starts += [at + start for start in _token_starts(segment, data[at:end].decode("utf-8"), tokenizer)]
        segment = []
        if token_id is not None:
            starts.append(end)
            at = end + len(names[token_id])
    return starts
