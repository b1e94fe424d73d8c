import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama2.checkpoint import store
from llama2.checkpoint.weights import dtype_name, expected_shapes
from llama2.errors import CheckpointError, Llama2Error
from llama2.model.family import FAMILY
from llama2.tokenizer.formats import load_tokenizer

FORMATS = ("hf", "meta", "gguf", "llama2c")


def place(folder: Path, format: str) -> Path:
    return folder / {"gguf": "model.gguf", "llama2c": "model.bin"}.get(format, format)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_every_format_converts_to_every_other_and_back(model, tmp_path, assert_same, first, second, is_tied):
    original = model(tied_embeddings=is_tied)
    store.save(original, place(tmp_path / "a", first), format=first)
    store.convert(place(tmp_path / "a", first), place(tmp_path / "b", second), to=second)
    store.convert(place(tmp_path / "b", second), place(tmp_path / "c", first), to=first)
    found = store.read(place(tmp_path / "c", first))
    assert found.config == original.config
    assert_same(found, original)


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_or_its_file_is_detected(written, tmp_path, format):
    path = written(format)
    found, where = store.detect(path)
    assert (found.NAME, where) == (format, path)
    if path.is_file():
        assert store.detect(tmp_path)[1] == path


def test_several_files_must_be_told_apart(written, tmp_path):
    written("gguf", "one")
    written("gguf", "two")
    with pytest.raises(CheckpointError, match=r"one\.gguf, two\.gguf"):
        store.detect(tmp_path)


def test_nothing_to_detect_lists_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        store.read(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.read("x" * 5000)
    with pytest.raises(CheckpointError, match=r"config\.json.*consolidated.*gguf"):
        store.read(tmp_path)
    (tmp_path / "x.txt").write_text("hello, this is not a checkpoint at all, is it")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        store.read(tmp_path / "x.txt")


def test_a_file_inside_a_checkpoint_points_to_its_folder(written):
    for format, name in (("hf", "model.safetensors"), ("meta", "consolidated.00.pth")):
        folder = written(format, format)
        with pytest.raises(CheckpointError, match="name its folder"):
            store.read(folder / name)


@pytest.mark.parametrize("format", ["hf", "gguf", "llama2c", "meta"])
def test_reading_a_shape_does_not_import_torch(written, format):
    code = f"import sys; from llama2.checkpoint import store, hub; store.read_config({str(written(format))!r}); "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, timeout=60)


@pytest.mark.parametrize("format", FORMATS)
def test_a_loaded_model_computes_the_same(model, written, format):
    tokens = torch.tensor([[1, 5, 2, 9, 3]])
    loaded = store.load(written(format))
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model()(tokens))


def test_mapped_weights_can_be_trained_without_touching_the_file(written):
    path = written("llama2c")
    before = path.read_bytes()
    loaded = store.load(path)
    with torch.no_grad():
        loaded.norm.weight.add_(1.0)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name, wanted", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("f32", torch.float32)])
def test_dtypes_have_short_forms(written, name, wanted):
    assert store.load(written("hf"), dtype=name).norm.weight.dtype == wanted


def test_an_unknown_dtype_names_the_nearest():
    with pytest.raises(CheckpointError, match="did you mean 'bfloat16'"):
        dtype_name("bfloat1")


def test_the_stored_dtype_is_kept(written, tmp_path):
    folder = written("hf", dtype="bf16")
    assert store.load(folder).norm.weight.dtype == torch.bfloat16
    for format in ("meta", "gguf"):
        store.convert(folder, place(tmp_path / "b", format), to=format)
        assert store.read(place(tmp_path / "b", format)).dtype == "bfloat16"


def test_float16_never_turns_numbers_into_infinity(model, tmp_path):
    original = model()
    with torch.no_grad():
        original.layers[1].attention.wo.weight[0, 0] = 1e5
    store.save(original, tmp_path / "a")
    for attempt in (
        lambda: store.load(tmp_path / "a", dtype="fp16"),
        lambda: store.convert(tmp_path / "a", tmp_path / "b", to="hf", dtype="fp16"),
        lambda: store.convert(tmp_path / "a", tmp_path / "b.gguf", to="gguf", dtype="fp16"),
    ):
        with pytest.raises(CheckpointError, match=r"wo.*100000"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_weights_that_are_not_numbers_are_loaded(model, tmp_path):
    original = model()
    with torch.no_grad():
        original.norm.weight[3] = float("nan")
    store.save(original, tmp_path / "a")
    assert store.load(tmp_path / "a").norm.weight[3].isnan()


def test_nothing_is_overwritten(model, written, tmp_path):
    folder, file = written("hf"), written("gguf", "other")
    for destination, to in ((folder, "hf"), (folder, "gguf"), (file, "gguf"), (file, "hf"), (tmp_path, "meta")):
        with pytest.raises(Llama2Error):
            store.convert(folder, destination, to=to)
        with pytest.raises(Llama2Error):
            store.save(model(), destination, format=to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.gguf", "written"]


def test_what_the_user_mistypes_is_named(written, tmp_path):
    folder = written("hf")
    for options, said in (
        ({"to": "ggfu"}, "did you mean 'gguf'"),
        ({"to": "hf", "dtype": "q8_0"}, "q8_0"),
        ({"to": "gguf", "shards": 2}, "shards"),
        ({"to": "hf", "dtype": "int8"}, "int8"),
    ):
        with pytest.raises(CheckpointError, match=said):
            store.convert(folder, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


def test_converting_without_a_tokenizer_leaves_a_note(written, tmp_path):
    notes = store.convert(written("hf"), tmp_path / "out", to="hf")
    assert len(notes) == 1 and "no tokenizer" in notes[0]


def test_the_tokenizer_travels_along(assets, tmp_path):
    source = assets / "checkpoints" / "tinystories-656K"
    wanted = load_tokenizer(source / "tokenizer.json").encode("Once upon a time", bos=True)
    path = source
    for step, format in enumerate(("hf", "gguf", "hf")):
        destination = place(tmp_path / str(step), format)
        store.convert(path, destination, to=format)
        assert load_tokenizer(destination).encode("Once upon a time", bos=True) == wanted
        path = destination
    assert (tmp_path / "2" / "hf" / "config.json").exists()


def test_a_tokenizer_of_another_model_is_refused(assets, written, tmp_path):
    tokenizer = load_tokenizer(assets / "checkpoints" / "stories260K" / "tok512.model")
    with pytest.raises(CheckpointError, match="512 pieces"):
        store.convert(written("hf"), tmp_path / "out", to="gguf", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_gguf_names_every_row_of_a_padded_embedding(assets, written, tmp_path):
    from llama2.files.gguf import read_header

    tokenizer = load_tokenizer(assets / "checkpoints" / "stories260K" / "tok512.model")
    store.convert(written("hf", vocab_size=520), tmp_path / "out.gguf", to="gguf", tokenizer=tokenizer)
    tokens = read_header(tmp_path / "out.gguf").metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list) and len(tokens) == 520 and tokens[519] == "[PAD519]"


def test_a_model_that_is_not_plain_is_not_saved(model, tmp_path):
    changed = model()
    changed.layers[0].attention.wq = torch.nn.Sequential(changed.layers[0].attention.wq)
    with pytest.raises(CheckpointError, match=r"attention\.wq"):
        store.save(changed, tmp_path / "a")


def test_expected_shapes_add_up_to_the_parameter_count():
    for name in ("llama2-7b", "llama3.2-1b", "stories15m"):
        shapes = expected_shapes(FAMILY[name])
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == FAMILY[name].n_parameters


def test_stories260k_tells_its_published_story(assets):
    tokenizer = load_tokenizer(assets / "checkpoints" / "stories260K" / "tok512.model")
    model = store.load(assets / "checkpoints" / "stories260K" / "stories260K.bin")
    ids = [1]
    with torch.no_grad():
        for _ in range(60):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside"
    )
