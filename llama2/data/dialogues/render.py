"""A sample to tokens, with those marked that are trained on.

    conversation    as `chat.render` has it, its answers marked, less those that the sample keeps out
    plain           no tags:   <s> prompt completion </s>
                               .   .      ^^^^^^^^^^ ^^^^    trained
    text            no tags:   <s> text </s>, all but <s>

Where the answer begins is found by laying one encoding of the whole over its characters, never by encoding parts.
Knows nothing of files.
"""

from itertools import pairwise

from llama2 import chat
from llama2.chat import Conversation, Rendered, _token_starts
from llama2.data.dialogues.sample import Sample
from llama2.errors import ChatError, DataError, TokenizerError, did_you_mean
from llama2.tokenizer.tokenizer import Tokenizer

PLAIN = "plain"
FORMATS = (*chat.FORMATS, PLAIN)


def render_sample(sample: Sample, tokenizer: Tokenizer, *, chat_format: str | None) -> Rendered:
    """Return a sample as ids, with those marked that are trained on.

    `chat_format` is one of `chat.FORMATS`, PLAIN (one question and its answer), or None to go by the tokenizer.
    A text is always BOS, text, EOS. Raises DataError that begins with the sample's place.
    """
    if chat_format is not None and chat_format not in FORMATS:
        hint = did_you_mean(chat_format, FORMATS)
        raise DataError(f"chat_format={chat_format!r} is not one of {', '.join(FORMATS)}{hint}")
    try:
        if sample.messages is None:
            rendered = _text(sample.text or "", tokenizer)
        elif chat_format == PLAIN:
            rendered = _plain(sample.messages, tokenizer)
        else:
            rendered = chat.render(sample.messages, tokenizer, format=chat_format)
        if sample.messages is not None:
            rendered = _chosen(rendered, sample.messages, sample.trained)
        if not any(rendered.trainable):
            raise DataError("nothing to train on: no answer is to be trained; take the record out")
    except (ChatError, DataError, TokenizerError) as error:
        raise DataError(f"{sample.where}: {error}") from None
    return rendered


def _text(text: str, tokenizer: Tokenizer) -> Rendered:
    if not text.strip():
        raise DataError("nothing to train on: the text is empty; take the record out")
    ids = tokenizer.encode(text, bos=True, eos=True)
    return Rendered(ids, [False] + [True] * (len(ids) - 1))


def _plain(messages: Conversation, tokenizer: Tokenizer) -> Rendered:
    roles = [message.role for message in messages]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"the roles are {', '.join(roles)}; 'plain' writes no tags, so it takes one question and its answer only: "
            f"choose one of {', '.join(chat.FORMATS)}"
        )
    prompt, text = messages[0].content, messages[0].content + messages[1].content
    bos, *ids, eos = tokenizer.encode(text, bos=True, eos=True)
    if tokenizer.vocabulary.remove_extra_spaces:
        prompt, text = (" ".join(part for part in whole.split(" ") if part) for whole in (prompt, text))
    starts, begins = _token_starts(ids, text, tokenizer), len(prompt.encode("utf-8"))
    ends = [end for _, end in pairwise([*starts, len(text.encode("utf-8"))])]
    # a token that holds the end of the prompt and the beginning of the answer is the answer's
    marks = [end > begins for end in ends]
    return Rendered([bos, *ids, eos], [False, *marks, True])


def _chosen(rendered: Rendered, messages: Conversation, trained: tuple[bool, ...] | None) -> Rendered:
    """Take the marks off the answers that are not trained on: each answer is one run of marked tokens."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    wanted = [trained is None or trained[i] for i in answers]
    for i, is_wanted in zip(answers, wanted, strict=True):
        if is_wanted and not messages[i].content.strip():
            raise DataError(f"message {i} (assistant) is empty, so there is nothing to train on; write the answer")
    run, marks, last = -1, [], False
    for mark in rendered.trainable:
        run += mark and not last
        marks.append(mark and run < len(wanted) and wanted[run])
        last = mark
    if run + 1 != len(answers):
        raise DataError(
            f"{run + 1} trained stretches of tokens for {len(answers)} answers, so answers cannot be told apart in "
            "this chat format; choose 'llama2' or 'llama3'"
        )
    return Rendered(rendered.tokens, marks)
