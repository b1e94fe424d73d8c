"""Our tokenizer.json, opened by transformers, gives our ids."""

import random

import pytest

from llama2.tokenizer.formats import load_tokenizer, save_tokenizer

transformers = pytest.importorskip("transformers")

SOURCES = (
    "tokenizers/llama2/tokenizer.model",
    "tokenizers/llama2/hf_tokenizer.json",
    "tokenizers/llama3/tokenizer.model",
    "checkpoints/stories260K/tok512.bin",
    "checkpoints/tinystories-656K",
)


@pytest.mark.parametrize("with_config", [False, True], ids=["alone", "beside a Llama config"])
@pytest.mark.parametrize("name", SOURCES)
def test_transformers_reads_what_we_write(assets, tmp_path, name, with_config):
    tokenizer = load_tokenizer(assets / name)
    save_tokenizer(tokenizer, tmp_path, format="json")
    if with_config:
        (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(5)
    alphabet = "  \nabcdethE.,'019<>\u00e9\u4f60\u0437\U0001f999"
    for text in ["Hello world", " Hello", *("".join(rng.choices(alphabet, k=40)) for _ in range(200))]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text), text
        assert theirs.encode(text) == tokenizer.encode(text, bos=True)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for special, token_id in tokenizer.special_tokens.items():
        assert theirs.encode(f"a{special}b", add_special_tokens=False) == tokenizer.encode(f"a{special}b", special=True)
        assert theirs.convert_tokens_to_ids(special) == token_id


def test_transformers_runs_our_chat_template(assets, tmp_path):
    from dataclasses import replace

    from llama2.chat import Message, render
    from llama2.tokenizer.tokenizer import Tokenizer

    template = (
        "{% for message in messages %}\n"
        "  {%- if loop.first %}{{ bos_token }}{% endif %}\n"
        "  {{- '[' ~ message['role'] ~ '] ' ~ message['content'] | trim ~ eos_token }}\n"
        "{% endfor %}\n{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    vocabulary = load_tokenizer(assets / "tokenizers/llama2/tokenizer.model").vocabulary
    tokenizer = Tokenizer(replace(vocabulary, chat_template=template))
    save_tokenizer(tokenizer, tmp_path, format="json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [Message("user", " Hi "), Message("assistant", "Hello"), Message("user", "Bye")]
    dicts = [{"role": message.role, "content": message.content} for message in messages]
    for prompt in (False, True):
        wanted = theirs.apply_chat_template(dicts, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        assert render(messages, tokenizer, format="template", add_generation_prompt=prompt).tokens == wanted
