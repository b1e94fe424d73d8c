"""An adapter's folder: written, read, put where a model is asked for; and everything that is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import llama2
from llama2.checkpoint import store
from llama2.checkpoint.adapter import adapter_shapes, is_adapter, read_adapter, write_adapter
from llama2.errors import CheckpointError, ConfigError, HubError, Llama2Error, TokenizerError
from llama2.model.lora import adapter_names, adapter_state, add_adapter
from llama2.model.lora_config import LoraConfig
from llama2.model.transformer import build
from llama2.tokenizer.formats import save_tokenizer
from tests.checkpoint.test_broken_files import damaged
from tests.pocket import POCKET, pocket_tokenizer

TOKENS = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
EVERY = LoraConfig(r=3, alpha=5, rslora=True, dora=True, dropout=0.1, trained_modules=("tok_embeddings", "output"))


def adapt(model, config=LoraConfig(r=2), name="default", seed=1):
    add_adapter(model, config, name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_state(model, name).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def write(folder, model, config=LoraConfig(r=2), *, base, name="default", **options):
    tensors = {key: (lambda value=value: value) for key, value in adapter_state(model, name).items()}
    write_adapter(folder, tensors, config, base=str(base), model=model.config, name=name, **options)
    return folder


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def adapter(model, tmp_path):
    """A base and an adapter for it, named from the adapter's folder."""
    plain = model()
    store.save(plain, tmp_path / "base")
    return write(tmp_path / "adapter", adapt(plain), base="../base")


@pytest.mark.parametrize("config", [LoraConfig(r=2), EVERY, LoraConfig(r=1, target_modules=("wk", "output"))])
def test_a_round_trip_keeps_every_bit(model, tmp_path, config):
    changed = adapt(model(), config)
    write(tmp_path / "a", changed, config, base="b")
    read = read_adapter(tmp_path / "a", model=changed.config)
    assert read.config == config and read.base == "b"
    state = adapter_state(changed)
    assert list(adapter_shapes(config, changed.config)) == list(read.tensors) and set(read.tensors) == set(state)
    for name, value in state.items():
        assert torch.equal(read.tensors[name](), value), name
        assert adapter_shapes(config, changed.config)[name] == value.shape
    other = read_adapter(tmp_path / "a", model=changed.config, name="other")
    assert {name.replace(".other", ".default") for name in other.tensors} == set(state)


@torch.no_grad()
@pytest.mark.parametrize("config", [LoraConfig(r=2), EVERY])
def test_the_folder_stands_for_the_adapted_model(model, tmp_path, config):
    plain = model()
    store.save(plain, tmp_path / "base")
    adapt(plain, config)
    write(tmp_path / "adapter", plain, config, base=tmp_path / "base")
    loaded = store.load(tmp_path / "adapter")
    assert adapter_names(loaded) == ("default",)
    assert torch.equal(loaded(TOKENS), plain.eval()(TOKENS))
    assert store.read_config(tmp_path / "adapter") == store.read_config(tmp_path / "adapter/adapter_config.json")
    assert store.read_config(tmp_path / "adapter") == plain.config
    assert (
        store.load(tmp_path / "adapter", dtype="bfloat16").layers[0].attention.wq.lora_a["default"].dtype
        == torch.bfloat16
    )


def test_the_base_is_found_from_the_folder_or_from_here(adapter, tmp_path, monkeypatch):
    place, upper = store.layers(adapter)
    assert place.resolve() == tmp_path / "base" and upper == adapter
    monkeypatch.chdir(tmp_path)
    change(adapter, base_model_name_or_path="base")
    assert store.layers("adapter")[0].resolve() == tmp_path / "base"
    assert store.layers("base")[0].name == "base" and len(store.layers("base")) == 1


@torch.no_grad()
def test_adapters_upon_adapters(model, tmp_path):
    plain = model()
    store.save(plain, tmp_path / "base")
    first, second = LoraConfig(r=2), LoraConfig(r=3, dora=True)
    write(tmp_path / "one", adapt(plain, first), first, base=tmp_path / "base")
    adapt(plain, second, "default2", seed=2)
    write(tmp_path / "two", plain, second, base=tmp_path / "one", name="default2")
    loaded = store.load(tmp_path / "two")
    assert adapter_names(loaded) == ("default", "default2")
    assert torch.equal(loaded(TOKENS), plain.eval()(TOKENS))
    change(tmp_path / "one", base_model_name_or_path=str(tmp_path / "two"))
    with pytest.raises(CheckpointError, match="its own base"):
        store.load(tmp_path / "two")


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary(model, tmp_path, tied):
    store.save(model(tied_embeddings=tied), tmp_path / "base")
    config = LoraConfig(r=2, trained_modules=("tok_embeddings",) if tied else ("tok_embeddings", "output"))
    larger = adapt(model(tied_embeddings=tied, vocab_size=70), config)
    weights = store.load(tmp_path / "base").state_dict()
    larger.load_state_dict({k: v for k, v in weights.items() if "tok_e" not in k and "output" not in k}, strict=False)
    write(tmp_path / "adapter", larger, config, base=tmp_path / "base")
    assert store.read_config(tmp_path / "adapter").vocab_size == 70
    loaded = store.load(tmp_path / "adapter")
    assert loaded.config.vocab_size == loaded.tok_embeddings.num_embeddings == 70
    assert torch.equal(loaded(TOKENS + 8), larger.eval()(TOKENS + 8))
    if not tied:
        tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
        del tensors["base_model.model.lm_head.weight"]
        save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
        with pytest.raises(CheckpointError, match="70 rows"):
            store.load(tmp_path / "adapter")


def test_text_is_written_from_an_adapters_folder(tmp_path):
    base = build(POCKET, seed=0)
    llama2.save(base, tmp_path / "base", tokenizer=pocket_tokenizer())
    write(tmp_path / "adapter", adapt(base), base="../base")
    llm = llama2.load(tmp_path / "adapter", device="cpu")
    alone = llm.generate("Once", max_new_tokens=8, temperature=0)
    assert alone != llama2.load(tmp_path / "base", device="cpu").generate("Once", max_new_tokens=8, temperature=0)
    assert llm.generate(["Once", "upon a", "time"], max_new_tokens=8, temperature=0)[0] == alone
    (tmp_path / "adapter/tokenizer.model").write_bytes(b"broken")  # its own comes first
    with pytest.raises(TokenizerError):
        llama2.load(tmp_path / "adapter", device="cpu")
    (tmp_path / "adapter/tokenizer.model").unlink()
    save_tokenizer(pocket_tokenizer(), tmp_path / "adapter", format="json")
    assert llama2.load(tmp_path / "adapter", device="cpu").generate("Once", max_new_tokens=8, temperature=0) == alone


def test_weights_alone_are_not_read(adapter, tmp_path):
    for call in (
        lambda: store.read(adapter),
        lambda: store.convert(adapter, tmp_path / "out", to="hf"),
        lambda: store.convert(adapter, tmp_path / "out.gguf", to="gguf"),
    ):
        with pytest.raises(CheckpointError, match="llama2 merge BASE"):
            call()
    with pytest.raises(CheckpointError, match="lora_a"):
        store.save(store.load(adapter), tmp_path / "out")
    with pytest.raises(CheckpointError, match="not an adapter's folder"):
        store.put_on(store.load(adapter), tmp_path / "base")
    assert store.detect(adapter)[0].NAME == "adapter" and is_adapter(adapter) and not is_adapter(tmp_path / "base")


@pytest.mark.parametrize(
    "values, said",
    [
        (dict(peft_type="LOHA"), "peft_type 'LOHA'"), (dict(peft_type=None), "peft_type None"),
        (dict(task_type="SEQ_CLS"), "SEQ_CLS"), (dict(bias="all"), "bias='all'"), (dict(lora_bias=True), "lora_bias"),
        (dict(rank_pattern={"q_proj": 4}), "rank_pattern"), (dict(alpha_pattern={"q_proj": 4}), "alpha_pattern"),
        (dict(layers_to_transform=[0]), "layers_to_transform"), (dict(fan_in_fan_out=True), "fan_in_fan_out"),
        (dict(use_qalora=True), "use_qalora"), (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(layer_replication=[[0, 1]]), "layer_replication"), (dict(some_new_thing="on"), "some_new_thing=on"),
        (dict(init_lora_weights="pissa"), "pissa"), (dict(modules_to_save=["norm"]), "'norm'"),
        (dict(modules_to_save=["lm_head"]), r"lm_head\.weight.*is missing"),
        (dict(modules_to_save=3), "modules_to_save=3"),
        (dict(target_modules=["q_prj"]), "did you mean 'q_proj'"), (dict(target_modules=None), "target_modules=None"),
        (dict(r="8"), "r='8'"), (dict(r=5), "another r"), (dict(lora_alpha=-1), "alpha=-1"),
        (dict(lora_dropout=2), "dropout=2"), (dict(use_dora=True), r"lora_magnitude_vector.*is missing"),
        (dict(use_rslora="yes"), "use_rslora='yes'"),
        (dict(base_model_name_or_path=None), "does not say which model"),
        (dict(base_model_name_or_path="../gone"), r"'../gone' is not found.*llama2 merge BASE"),
    ],
)  # fmt: skip
def test_settings_that_are_not_read_are_named(adapter, values, said):
    change(adapter, **values)
    with pytest.raises((CheckpointError, ConfigError), match=said):
        store.load(adapter)


def test_harmless_settings_of_peft_are_passed_over(adapter):
    change(adapter, peft_version="0.21.2", qalora_group_size=16, megatron_core="megatron.core", eva_config=None)
    change(adapter, target_modules="all-linear")
    store.load(adapter)
    change(adapter, target_modules=r".*\.(q|k|v|o|up|down|gate)_proj")
    store.load(adapter)
    change(adapter, target_modules=[f"model.layers.{i}.self_attn.q_proj" for i in range(2)])
    assert read_adapter(adapter, model=store.read_config(adapter)).config.target_modules[0] == "wq"


def test_a_pickle_is_not_read(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle.*save_pretrained"):
        store.load(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no adapter_model.safetensors"):
        store.load(adapter)


def test_tensors_that_do_not_fit_are_named(adapter, model, tmp_path):
    file, key = adapter / "adapter_model.safetensors", "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    whole = load_file(file)
    for tensors, said in (
        ({k: v for k, v in whole.items() if k != key}, f"{key}.*is missing"),
        ({**whole, key: torch.zeros(2, 31)}, rf"{key}.*\(2, 31\).*\(2, 32\).*another base"),
        ({**whole, key.replace("layers.1", "layers.7"): whole[key].clone()}, "layers.7.*no place in this base"),
        ({**whole, "base_model.model.model.norm.lora_A.weight": whole[key].clone()}, "norm"),
        ({**whole, "base_model.model.model.embed_tokens.weight": torch.zeros(9, 32)}, "9 rows"),
        ({**whole, "base_model.model.model.embed_tokens.weight": torch.zeros(64, 8)}, r"\(64, 8\)"),
        ({**whole, key.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(96)}, "belongs to nothing"),
        ({**whole, "lora_embedding_A": torch.zeros(1)}, "lora_embedding_A"),
    ):
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=said):
            store.load(adapter)
    save_file(whole, file)
    store.save(model(dim=48), tmp_path / "wider")
    change(adapter, base_model_name_or_path="../wider")
    with pytest.raises(CheckpointError, match=r"lora_A.weight' has shape \(2, 32\).*\(2, 48\).*another base"):
        store.load(adapter)


def test_one_end_of_a_tied_matrix_is_not_read(model, tmp_path):
    config = LoraConfig(r=2, trained_modules=("tok_embeddings",))
    tied = adapt(model(tied_embeddings=True), config)
    write(tmp_path / "a", tied, config, base="b")
    read_adapter(tmp_path / "a", model=tied.config)
    change(tmp_path / "a", ensure_weight_tying=False)
    read_adapter(tmp_path / "a", model=tied.config)  # both ends are there and the same
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="ensure_weight_tying"):
        read_adapter(tmp_path / "a", model=tied.config)


def test_an_adapter_among_weights_is_not_guessed(adapter, tmp_path):
    (tmp_path / "base/adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    with pytest.raises(CheckpointError, match="both an adapter"):
        store.load(tmp_path / "base")


def test_what_is_not_whole_is_not_written(model, tmp_path):
    changed = adapt(model())
    tensors = {key: (lambda value=value: value) for key, value in adapter_state(changed).items()}
    name = "layers.0.attention.wq.lora_a.default"
    lacking = {key: value for key, value in tensors.items() if key != name}
    odd = {**tensors, "layers.0.attention.wq.magnitude.default": lambda: torch.zeros(32)}
    wrong = {**tensors, name: lambda: torch.zeros(1)}
    for given, said in ((lacking, "is missing"), (odd, "not one of this adapter"), (wrong, "shape")):
        with pytest.raises(Llama2Error, match=said):
            write_adapter(tmp_path / "a", given, LoraConfig(r=2), base="b", model=changed.config)
    huge = {**tensors, name: lambda: torch.full((2, 32), 1e6)}
    with pytest.raises(CheckpointError, match="65504"):
        write_adapter(tmp_path / "a", huge, LoraConfig(r=2), base="b", model=changed.config, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="r=0"):
        write_adapter(tmp_path / "a", tensors, replace(LoraConfig(), r=0), base="b", model=changed.config)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_damage_is_one_error_or_none(adapter, file):
    import random

    rng, whole = random.Random(0), (adapter / file).read_bytes()
    n_loaded = 0
    for _ in range(60):
        (adapter / file).write_bytes(damaged(whole, rng))
        try:
            for weight in store.load(adapter).parameters():
                weight.float().sum()
            n_loaded += 1
        except Llama2Error as error:
            assert not isinstance(error, HubError)
    assert n_loaded < 60
