"""A prompt and its answer as tokens, of which the last answer only is trained.

    <s> [INST] Hi [/INST] Hello! </s> <s> [INST] Bye [/INST] See you. </s>
                                                            ^^^^^^^^^^^^^^    trained

The ids are those of the whole conversation, as `chat` has them.
"""

from llama2 import chat
from llama2.chat import Conversation, Message, Rendered
from llama2.data.dialogues.render import PLAIN, _chosen, _plain
from llama2.errors import ChatError, DataError, TokenizerError
from llama2.tokenizer.tokenizer import Tokenizer


def render_answer(
    prompt: Conversation,
    answer: str,
    tokenizer: Tokenizer,
    *,
    chat_format: str | None = None,
    where: str = "the answer",
) -> Rendered:
    """Return prompt and answer as ids, with the answer and the token that ends it marked.

    `chat_format` is one of `chat.FORMATS`, PLAIN (one question and its answer), or None to go by the tokenizer. An
    answer that was sampled may be empty: then the token that ends it is marked. Raises DataError that begins with
    `where`.
    """
    messages = (*prompt, Message("assistant", answer))
    try:
        if chat_format == PLAIN:
            rendered = _plain(messages, tokenizer)
        else:
            rendered = chat.render(messages, tokenizer, format=chat_format)
        # a conversation without the answer's text, since an empty one would be refused here
        stand_in = (*prompt, Message("assistant", "answer"))
        return _chosen(rendered, stand_in, (*(False for _ in prompt), True))
    except (ChatError, DataError, TokenizerError) as error:
        raise DataError(f"{where}: {error}") from None
