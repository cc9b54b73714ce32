"""What the drop-in schedulers write is diffusers', and loads with fastddim and without."""

import copy
import io
import json
import pickle
import types

import diffusers
import pytest
import torch

import fastddim
from fastddim import DDIMInverseScheduler, DDIMScheduler
from unets import small_unet

CLASSES = [(DDIMScheduler, diffusers.DDIMScheduler), (DDIMInverseScheduler, diffusers.DDIMInverseScheduler)]


def make(kind=DDIMScheduler):
    scheduler = kind(beta_schedule="squaredcos_cap_v2", clip_sample_range=0.7)
    scheduler.set_timesteps(10)
    scheduler.backend = "reference"
    return scheduler


def step(scheduler):
    x = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    return scheduler.step(x.flip(0), 500, x, return_dict=False)


def unpickle(scheduler):
    return pickle.loads(pickle.dumps(scheduler))


def torch_load(scheduler):
    file = io.BytesIO()
    torch.save(scheduler, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, unpickle, torch_load])
@pytest.mark.parametrize(("ours", "theirs"), CLASSES)
def test_a_copy_keeps_everything_and_goes_its_own_way(ours, theirs, copied):
    scheduler, expected = make(ours), make(theirs)
    step(scheduler)
    other = copied(scheduler)
    assert type(other) is ours and other.backend == "reference" and other.config == scheduler.config
    torch.testing.assert_close(step(other), step(expected), rtol=2e-6, atol=2e-6)
    other.alphas_cumprod = other.alphas_cumprod**1.5
    torch.testing.assert_close(step(scheduler), step(expected), rtol=2e-6, atol=2e-6)
    expected.alphas_cumprod = expected.alphas_cumprod**1.5
    torch.testing.assert_close(step(other), step(expected), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("ours", "theirs"), CLASSES)
def test_a_configuration_is_diffusers_and_has_no_backend(ours, theirs, tmp_path):
    make(ours).save_pretrained(tmp_path / "scheduler")
    (written,) = (tmp_path / "scheduler").iterdir()
    config = json.loads(written.read_text())
    assert config["_class_name"] == theirs.__name__ and "backend" not in config
    for kind in (ours, theirs):
        loaded = kind.from_pretrained(tmp_path, subfolder="scheduler")
        assert type(loaded) is kind and loaded.config.clip_sample_range == 0.7
    again = ours.from_config(theirs.from_pretrained(tmp_path, subfolder="scheduler").config)
    assert type(again) is ours and again.config.clip_sample_range == 0.7 and again.backend == "auto"


@pytest.mark.parametrize(("ours", "theirs"), CLASSES)
def test_what_is_pushed_to_the_hub_is_diffusers(ours, theirs, tmp_path, monkeypatch):
    pushed = []
    made = types.SimpleNamespace(repo_id="me/scheduler")
    for module in (diffusers.configuration_utils, diffusers.utils.hub_utils):
        monkeypatch.setattr(module, "create_repo", lambda *args, **kwargs: made)
    upload = lambda self, folder, repo_id, **kwargs: pushed.append((repo_id, theirs.from_pretrained(folder)))  # noqa: E731
    monkeypatch.setattr(ours, "_upload_folder", upload)
    # With a subfolder it does not ask the hub for a model card.
    make(ours).push_to_hub("me/scheduler", subfolder="scheduler")
    make(ours).save_pretrained(str(tmp_path), push_to_hub=True, repo_id="me/scheduler")
    assert [name for name, _ in pushed] == ["me/scheduler"] * 2
    assert all(scheduler.config.clip_sample_range == 0.7 for _, scheduler in pushed)


def make_pipeline(how):
    unet, scheduler, inverse = small_unet(), make(), make(DDIMInverseScheduler)
    if how == "assigned":
        # Its constructor converts a scheduler to diffusers' class.
        pipe = diffusers.DDIMPipeline(unet, scheduler)
        pipe.scheduler = scheduler
        return pipe, {"scheduler": "DDIMScheduler"}, {}
    pipe = diffusers.StableDiffusionDiffEditPipeline(
        None, None, None, unet, scheduler, None, None, inverse, requires_safety_checker=False
    )
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return pipe, {"scheduler": "DDIMScheduler", "inverse_scheduler": "DDIMInverseScheduler"}, absent


@pytest.mark.parametrize("how", ["given", "assigned"])
def test_a_pipeline_with_drop_ins_is_a_plain_diffusers_folder(how, tmp_path):
    pipe, names, absent = make_pipeline(how)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {name: index[name] for name in names} == {name: ["diffusers", kind] for name, kind in names.items()}
    loaded = type(pipe).from_pretrained(tmp_path, **absent)
    for name, kind in names.items():
        scheduler = getattr(loaded, name)
        assert type(scheduler) is getattr(diffusers, kind) and scheduler.config.clip_sample_range == 0.7
        # One that is handed over while loading stays what it is, and is saved as before.
        own = getattr(pipe, name)
        again = type(pipe).from_pretrained(tmp_path, **absent, **{name: own})
        assert (getattr(again, name) is own) == (how == "given")
        assert again.config[name] == ("diffusers", kind)


def test_load_pipeline_puts_the_drop_in_back(tmp_path):
    make_pipeline("assigned")[0].save_pretrained(tmp_path)
    pipe = fastddim.load_pipeline(tmp_path)
    assert type(pipe.scheduler) is DDIMScheduler and pipe.scheduler.config.clip_sample_range == 0.7
    assert pipe.config["scheduler"] == ("diffusers", "DDIMScheduler")


def test_a_subclass_keeps_the_name_of_its_own_module():
    own = type("Own", (DDIMScheduler,), {})
    assert own().__module__ == own.__module__ == __name__
    assert DDIMScheduler.__module__ == "fastddim.scheduler"
    pipe = diffusers.DDIMPipeline(small_unet(), make())
    pipe.scheduler = own()
    assert pipe.config["scheduler"] == (__name__, "Own")
