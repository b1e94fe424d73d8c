"""Every format is read, written and read again with the same ids; broken files give one clear error."""

import json
import random
import shutil
import struct
import warnings

import pytest

from llama2.errors import TokenizerError
from llama2.files import gguf as container
from llama2.tokenizer.document import check_scores
from llama2.tokenizer.formats import load_tokenizer, save_tokenizer
from llama2.tokenizer.gguf import from_gguf_metadata, to_gguf_metadata
from llama2.tokenizer.ranks import special_names
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.vocabulary import CONTROL, USER_DEFINED, with_added

SPM = (
    "tokenizers/llama2/tokenizer.model",
    "tokenizers/llama2/tokenizer.bin",
    "tokenizers/llama2/hf_tokenizer.json",
    "checkpoints/stories260K/tok512.bin",
    "checkpoints/stories260K/stories260K.gguf",
    "checkpoints/tinystories-656K/tokenizer.json",
)


@pytest.fixture(scope="module")
def texts(assets) -> list[str]:
    """Pages in several languages, and noise made of the characters that break tokenizers."""
    folder = assets / "pretrain/tinystories"
    found = [path.read_text(encoding="utf-8")[:20_000] for path in sorted(folder.iterdir())[:2] if path.is_file()]
    rng = random.Random(7)
    alphabet = (
        "  \n\tabcdeEth.,'0123456789<>|_/[]s\u00e9\u00fc\u4f60\u597d\u4e16\u0437\u0434\U0001f999\u0301\u3000\ufffd"
    )
    found += ["".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(400)]
    found += [" " * n + "x" + " " * n for n in range(1, 70)] + ["a" * n for n in range(1, 30)]
    letters = [chr(rng.randrange(32, 0xD7FF)) for _ in range(3000)]
    return [*found, "".join(letters), "".join(rng.choices("aeinorst ", k=5000))]


def assert_same_ids(a: Tokenizer, b: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        assert a.encode(text) == b.encode(text), text[:80]


def gguf_again(tokenizer: Tokenizer, tmp_path) -> Tokenizer:
    container.write(tmp_path / "vocabulary.gguf", to_gguf_metadata(tokenizer.vocabulary), [])
    return load_tokenizer(tmp_path / "vocabulary.gguf")


@pytest.mark.parametrize("name", SPM)
def test_every_spm_format_goes_through_every_other(assets, tmp_path, texts, name):
    tokenizer = load_tokenizer(assets / name)
    again = {
        format: load_tokenizer(save_tokenizer(tokenizer, tmp_path, format=format))
        for format in ("model", "json", "bin")
    }
    again["gguf"] = gguf_again(tokenizer, tmp_path)
    for other in again.values():
        assert_same_ids(tokenizer, other, texts)
        for field in ("pieces", "types", "bos_id", "eos_id", "unk_id"):
            assert getattr(other.vocabulary, field) == getattr(tokenizer.vocabulary, field)


def test_removed_spaces_survive_model_json_and_gguf(assets, tmp_path, texts):
    tokenizer = load_tokenizer(assets / "checkpoints/stories260K/tok512.model")
    assert tokenizer.vocabulary.remove_extra_spaces
    assert tokenizer.encode(" a  b ") == tokenizer.encode("a b")
    assert_same_ids(tokenizer, load_tokenizer(save_tokenizer(tokenizer, tmp_path, format="json")), texts)
    assert_same_ids(tokenizer, gguf_again(tokenizer, tmp_path), texts)
    with pytest.warns(UserWarning, match="spaces"):
        save_tokenizer(tokenizer, tmp_path, format="bin")


def test_a_model_file_is_copied_byte_for_byte(assets, tmp_path):
    source = assets / "tokenizers/llama2/tokenizer.model"
    assert save_tokenizer(load_tokenizer(source), tmp_path, format="model").read_bytes() == source.read_bytes()
    again = save_tokenizer(load_tokenizer(assets / "tokenizers/llama2/tokenizer.bin"), tmp_path / "b", format="bin")
    assert again.read_bytes() == (assets / "tokenizers/llama2/tokenizer.bin").read_bytes()
    head = again.read_bytes()[:17]
    assert head == bytes.fromhex("1b00000000000000050000003c756e6b3e")


def test_llama3_goes_through_ranks_json_and_gguf(assets, tmp_path, texts):
    source = assets / "tokenizers/llama3/tokenizer.model"
    tokenizer = load_tokenizer(source)
    assert save_tokenizer(tokenizer, tmp_path, format="model").read_bytes() == source.read_bytes()
    from_json = load_tokenizer(save_tokenizer(tokenizer, tmp_path / "json", format="json"))
    for other in (from_json, gguf_again(tokenizer, tmp_path)):
        assert_same_ids(tokenizer, other, texts)
        assert other.vocabulary.pieces == tokenizer.vocabulary.pieces
        assert (other.bos_id, other.eos_id, other.pad_id) == (128000, 128001, 128004)
        assert set(other.vocabulary.stop_ids) >= {128008, 128009}
    assert save_tokenizer(from_json, tmp_path / "again", format="model").read_bytes() == source.read_bytes()
    assert len(tokenizer.vocabulary.merges) == 280_147
    with pytest.raises(TokenizerError, match="byte-level"):
        save_tokenizer(tokenizer, tmp_path, format="bin")


def test_llama3_names_by_version(assets, tmp_path):
    old, new = special_names("3"), special_names("3.1")
    assert len(old) == len(new) == len(set(old)) == len(set(new)) == 256
    assert [old[i] for i in (4, 5, 8, 10, 11, 12, 255)] == [
        f"<|reserved_special_token_{n}|>" for n in (2, 3, 4, 5, 6, 7, 250)
    ]
    assert [new[i] for i in (2, 4, 5, 8, 9, 10, 11, 12, 255)] == [
        "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>", "<|step_id|>", "<|eom_id|>", "<|eot_id|>",
        "<|python_tag|>", "<|image|>", "<|reserved_special_token_2|>", "<|reserved_special_token_245|>",
    ]  # fmt: skip
    shutil.copyfile(assets / "tokenizers/llama3/tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "params.json").write_text('{"dim": 4096}')
    assert "<|eom_id|>" not in load_tokenizer(tmp_path).special_tokens
    (tmp_path / "params.json").write_text('{"use_scaled_rope": true}')
    assert "<|eom_id|>" in load_tokenizer(tmp_path).special_tokens
    assert load_tokenizer(tmp_path, llama3_names="3").pad_id is None
    with pytest.raises(TokenizerError, match="llama3_names"):
        load_tokenizer(tmp_path, llama3_names="4")


def test_tokens_beside_a_model_file_are_added(assets, tmp_path):
    shutil.copyfile(assets / "tokenizers/llama2/tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 32000, "<|im_end|>": 32001}')
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "eos_token": {"content": "<|im_end|>"}}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 32001]}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.n_vocab, tokenizer.pad_id, tokenizer.eos_id) == (32002, 32000, 32001)
    assert tokenizer.vocabulary.stop_ids == (2, 32001) and tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.encode("a<|im_end|>", special=True)[-1] == 32001
    assert 32001 not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.decode([15043, 32001, 32000]) == "Hello"
    for format in ("model", "json"):
        again = load_tokenizer(save_tokenizer(tokenizer, tmp_path / format, format=format))
        assert again.special_tokens == tokenizer.special_tokens
        assert (again.pad_id, again.eos_id, again.chat_template) == (32000, 32001, "{{ messages }}")
        assert 32001 not in again.encode("a<|im_end|>")
    assert gguf_again(tokenizer, tmp_path / "g").special_tokens == tokenizer.special_tokens
    with pytest.raises(TokenizerError, match="<pad>"):
        save_tokenizer(tokenizer, tmp_path, format="bin")


def test_added_tokens_that_do_not_fit_are_refused(assets, tmp_path):
    shutil.copyfile(assets / "tokenizers/llama2/tokenizer.model", tmp_path / "tokenizer.model")
    for broken in ('{"x": 40000}', '{"x": 500}', "[1]", "{", '{"<pad>": 32000, "<s>": 32001}'):
        (tmp_path / "added_tokens.json").write_text(broken)
        with pytest.raises(TokenizerError):
            load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    for broken in ('{"eos_token": "<nowhere>"}', '{"added_tokens_decoder": {"x": {}}}', '{"added_tokens_decoder": 3}'):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(TokenizerError):
            load_tokenizer(tmp_path)


def test_special_tokens_inside_the_merge_table_stay_out_of_reach(tmp_path):
    """A hostile or careless file may list a special token both as an ordinary piece and as the fruit of a merge."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "<", "s", ">", "<s", "\u2581a", "\u2603"]
    document = {
        "added_tokens": [{"id": i, "content": pieces[i], "special": True} for i in (0, 1, 2, 10)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "vocab": {piece: i for i, piece in enumerate(pieces)},
                  "merges": ["< s", "<s >", "\u2581 a"]},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps({**document, "version": "1.0"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<s>") == [9, 8, 7]
    assert tokenizer.encode("a\u2603") == [9, 0]
    assert tokenizer.encode("a<s>\u2603", special=True)[-2:] == [1, 10]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_user_defined_pieces_are_matched_in_text(assets, tmp_path):
    base = load_tokenizer(assets / "tokenizers/llama2/tokenizer.bin").vocabulary
    added = with_added(base, {32000: ("<tool>", False), 32001: ("<end>", True)}, origin="test")
    assert added.types[32000:] == (USER_DEFINED, CONTROL)
    tokenizer = Tokenizer(added)
    assert 32000 in tokenizer.encode("a<tool>b") and 32001 not in tokenizer.encode("a<end>b")
    assert tokenizer.decode(tokenizer.encode("a<tool>b")) == "a<tool>b"
    assert_same_ids(tokenizer, gguf_again(tokenizer, tmp_path), ["a<tool>b", "<tool>", " <tool> x"])
    with pytest.raises(TokenizerError, match="write it as model"):
        save_tokenizer(tokenizer, tmp_path, format="json")


def test_merges_that_scores_cannot_say_are_refused_by_name(assets, tmp_path):
    document = json.loads((assets / "checkpoints/tinystories-656K/tokenizer.json").read_text(encoding="utf-8"))
    check_scores(load_tokenizer(assets / "checkpoints/tinystories-656K/tokenizer.json").vocabulary)
    document["model"]["merges"].remove("t h")
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="'th'"):
        save_tokenizer(tokenizer, tmp_path / "out", format="model")
    document["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("e\u0301the") == tokenizer.encode("\u00e9the")
    for format in ("model", "bin"):
        with pytest.raises(TokenizerError, match="only json"):
            save_tokenizer(tokenizer, tmp_path / "out", format=format)
    again = load_tokenizer(save_tokenizer(tokenizer, tmp_path / "out", format="json"))
    assert again.encode("e\u0301 the") == tokenizer.encode("e\u0301 the")


def test_the_json_of_transformers_5_is_read_and_carried_over_with_a_warning(assets, tmp_path, texts):
    document = json.loads((assets / "tokenizers/llama2/hf_tokenizer.json").read_text(encoding="utf-8"))
    document["normalizer"] = None
    document["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    document["model"]["unk_token"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(" Hello") == [15043]
    assert tokenizer.encode("<s>Hello</s>", special=True) == [1, 10994, 2]
    assert tokenizer.encode("<unk>") == [529, 2960, 29958]
    with pytest.warns(UserWarning, match="begins with one"):
        model = load_tokenizer(save_tokenizer(tokenizer, tmp_path / "out", format="model"))
    assert_same_ids(tokenizer, model, [text for text in texts if text[0] != " "])


def test_other_families_are_refused_by_name(tmp_path, assets):
    document = json.loads((assets / "checkpoints/tinystories-656K/tokenizer.json").read_text(encoding="utf-8"))
    for change, word in (
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "WordPiece"),
        ({"decoder": None}, "None"),
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(TokenizerError, match=word):
            load_tokenizer(tmp_path)


def test_lookup(assets, tmp_path):
    stories = assets / "checkpoints/stories260K"
    assert load_tokenizer(stories).vocabulary.source.format == "model"
    assert load_tokenizer(stories / "stories260K.bin").n_vocab == 512
    assert load_tokenizer(stories / "stories260K.gguf").vocabulary.source is None
    assert load_tokenizer(assets / "checkpoints/tinystories-656K/model.safetensors").n_vocab == 2048
    with pytest.raises(TokenizerError, match=r"tokenizer\.model, tokenizer\.json"):
        load_tokenizer(tmp_path)
    for name in ("tok1.bin", "tok2.bin"):
        shutil.copyfile(stories / "tok512.bin", tmp_path / name)
    with pytest.raises(TokenizerError, match=r"tok1\.bin, tok2\.bin; name one"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    container.write(tmp_path / "bare.gguf", {"general.architecture": "llama"}, [])
    (tmp_path / "tok2.bin").unlink()
    assert load_tokenizer(tmp_path / "bare.gguf").n_vocab == 512


def test_gguf_keeps_flags_and_template(assets):
    vocabulary = load_tokenizer(assets / "tokenizers/llama2/tokenizer.bin").vocabulary
    keys = to_gguf_metadata(vocabulary)
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_bos_token"] is True
    keys |= {"tokenizer.chat_template": "{{ x }}", "tokenizer.ggml.add_bos_token": False}
    again = from_gguf_metadata(keys, name="test")
    assert again.chat_template == "{{ x }}" and again.add_bos is False
    for broken in (
        {"tokenizer.ggml.model": "bert"},
        {"tokenizer.ggml.tokens": [1]},
        {"tokenizer.ggml.scores": [0.0]},
        {"tokenizer.ggml.bos_token_id": 99999},
        {"tokenizer.ggml.bos_token_id": "x"},
        {"tokenizer.ggml.token_type": ["x"]},
        {"tokenizer.ggml.model": "gpt2"},
        {"tokenizer.ggml.tokens": ["a"] * 32000},
    ):
        with pytest.raises(TokenizerError):
            from_gguf_metadata({**keys, **broken}, name="test")


@pytest.mark.parametrize("name", ["model", "json", "bin", "ranks", "gguf"])
def test_broken_files_give_one_clear_error(assets, tmp_path, name):
    sources = {
        "model": "checkpoints/stories260K/tok512.model",
        "json": "checkpoints/tinystories-656K/tokenizer.json",
        "bin": "checkpoints/stories260K/tok512.bin",
        "ranks": "tokenizers/llama3/tokenizer.model",
        "gguf": "checkpoints/stories260K/stories260K.gguf",
    }
    data = (assets / sources[name]).read_bytes()
    path = tmp_path / f"tokenizer.{'model' if name == 'ranks' else name}"
    rng = random.Random(3)
    broken = [b"", b"\x00" * 100, b"garbage" * 50, rng.randbytes(5000), b"[" * 100_000, b"{}", b"null", b'{"model": 3}']
    broken += [data[: len(data) * part // 7] for part in range(1, 7)]
    for _ in range(10 if name == "ranks" else 60):
        spoiled = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            spoiled[rng.randrange(min(len(data), 20_000))] = rng.randrange(256)
        broken.append(bytes(spoiled))
    for content in broken:
        path.write_bytes(content)
        with warnings.catch_warnings():
            try:
                load_tokenizer(path).encode("Hello world")
            except TokenizerError as error:
                assert len(str(error)) > 20


def test_broken_ranks_and_bins_are_named(assets, tmp_path):
    path = tmp_path / "tokenizer.model"
    for lines in (b"IQ== 0\nIQ== 1\n", b"IQ== 0\nIg== 5\n", b"IQ== 0\n???? 1\n", b"IQ== 0\nIg==\n", b"IQ== 0\n"):
        path.write_bytes(lines)
        with pytest.raises(TokenizerError, match=r"line 2|no rank for"):
            load_tokenizer(path)
    path = tmp_path / "tokenizer.bin"
    for entry in (struct.pack("<IfI", 8, 0.0, 2**31), struct.pack("<IfI", 2**32 - 1, 0.0, 2**32 - 1) + b"x"):
        path.write_bytes(entry)
        with pytest.raises(TokenizerError, match="llama2.c"):
            load_tokenizer(path)


def test_a_failed_write_leaves_the_old_file(assets, tmp_path):
    tokenizer = load_tokenizer(assets / "tokenizers/llama3")
    (tmp_path / "tokenizer.bin").write_bytes(b"old")
    for format in ("bin", "gguf"):
        with pytest.raises(TokenizerError):
            save_tokenizer(tokenizer, tmp_path, format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.bin"]
    assert (tmp_path / "tokenizer.bin").read_bytes() == b"old"
