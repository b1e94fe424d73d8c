"""Several LoRA adapters over one base, chosen by name, loaded and unloaded under way."""

import concurrent.futures

import httpx2
import openai
import pytest
import torch

import llama2
from llama2.checkpoint.adapter import write_adapter
from llama2.errors import RequestError
from llama2.model.lora import adapter_state, add_adapter
from llama2.model.lora_config import LoraConfig
from llama2.serve.config import ServeConfig
from llama2.serve.models import Models
from tests.serve.conftest import client_of, serving

PROMPT = {"prompt": "One", "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def folders(pocket_path, tmp_path_factory):
    """Two adapters of the pocket model, and one that brings a vocabulary of its own."""
    found = {}
    for seed, name in enumerate(("poet", "clerk", "whole")):
        config = LoraConfig(r=2, trained_modules=("output",) if name == "whole" else ())
        model = add_adapter(llama2.load(pocket_path, device="cpu").model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_state(model).values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        found[name] = tmp_path_factory.mktemp("adapters") / name
        tensors = {key: (lambda value=value: value) for key, value in adapter_state(model).items()}
        write_adapter(found[name], tensors, config, base=str(pocket_path), model=model.config)
    return found


@pytest.fixture(scope="module")
def server(pocket_path, folders):
    models = (f"pocket={pocket_path}",)
    with serving(models=models, adapter=(f"poet={folders['poet']}",), allow_adapter_loading=True) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def text(client, model):
    return client.completions.create(model=model, **PROMPT).choices[0].text


def post(server, path, **body):
    return httpx2.post(f"{server.url}/v1/{path}_lora_adapter", json=body)


def test_an_adapter_answers_under_its_name_and_the_base_under_its_own(client, pocket, folders):
    base = pocket.generate("One", max_new_tokens=24, temperature=0)
    poet = llama2.load(folders["poet"], device="cpu").generate("One", max_new_tokens=24, temperature=0)
    assert base != poet
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: text(client, name), ["pocket", "poet"] * 4))
    assert found == [base, poet] * 4
    listed = {model.id: model.model_dump()["parent"] for model in client.models.list()}
    assert listed == {"pocket": None, "poet": "pocket"}


def test_adapters_come_and_go(server, client, folders):
    clerk = llama2.load(folders["clerk"], device="cpu").generate("One", max_new_tokens=24, temperature=0)
    before = text(client, "pocket")
    assert post(server, "load", lora_name="clerk", lora_path=str(folders["clerk"])).status_code == 200
    assert text(client, "clerk") == clerk and text(client, "pocket") == before
    assert post(server, "load", lora_name="clerk", lora_path=str(folders["clerk"])).status_code == 400
    assert post(server, "unload", lora_name="clerk").status_code == 200
    with pytest.raises(openai.NotFoundError):
        text(client, "clerk")
    assert post(server, "unload", lora_name="clerk").status_code == 404
    assert text(client, "pocket") == before


def test_what_cannot_be_loaded(server, client, folders):
    before = text(client, "pocket")
    done = post(server, "load", lora_name="whole", lora_path=str(folders["whole"]))
    assert done.status_code == 400 and "model of its own" in done.json()["error"]["message"]
    assert post(server, "load", lora_name="x", lora_path="/nowhere").status_code == 400
    assert text(client, "pocket") == before


def test_clients_load_nothing_unless_they_may(client, server):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "config", server.config.model_copy(update={"allow_adapter_loading": False}))
        assert post(server, "load", lora_name="x", lora_path="/").status_code == 403
        assert post(server, "unload", lora_name="poet").status_code == 403


def test_two_servings_of_one_model_have_their_own_adapters(pocket_path, folders):
    models = (f"a={pocket_path}", f"b={pocket_path}")
    with serving(models=models, adapter=(f"b/poet={folders['poet']}",)) as server:
        client = client_of(server)
        assert text(client, "poet") != text(client, "b") == text(client, "a")
        client.close()


def test_an_adapter_for_no_model_is_a_plain_mistake(pocket_path):
    config = ServeConfig(models=(f"pocket={pocket_path}",), adapter=("pockt/x=somewhere",))
    with pytest.raises(RequestError, match="pockt.*did you mean 'pocket'"):
        Models(config)
