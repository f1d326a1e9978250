"""Which model a calibration belongs to."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from service.errors import ModelNotSupportedError
from service.models.calibration_file import FILE_NAME, fingerprint, load_calibrations
from service.models.loading import default_model_directory
from sparse_methods import Phase, get_sparse_method


@pytest.fixture
def model_dir(tiny_model_dir, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def write(directory, **changes):
    shipped = json.loads((default_model_directory() / FILE_NAME).read_text())
    content = {**shipped, "model_fingerprint": fingerprint(directory), **changes}
    (directory / FILE_NAME).write_text(json.dumps(content))


def weights_file(directory):
    (file,) = directory.glob("*.safetensors")
    return file


def test_the_built_in_model_ships_with_its_calibration():
    (entry,) = load_calibrations(None, default_model_directory())
    assert (entry.method, entry.version) == ("flash_skip_softmax", "v2")
    assert set(entry.phases) == set(Phase)
    method = get_sparse_method("flash_skip_softmax", "v2")({"target_sparsity": 0.5})
    method.with_calibration(entry).check_servable(128)
    for fits in entry.phases.values():
        assert len(fits.layers) == 8
        assert fits.model.r_squared > 0.9  # from 1,024 to 16,384 tokens


def test_no_file_is_no_calibration(model_dir):
    assert load_calibrations(None, model_dir) == ()


def test_the_file_beside_the_model_is_read_and_another_one_if_named(model_dir, tmp_path):
    write(model_dir)
    assert len(load_calibrations(None, model_dir)) == 1
    moved = (model_dir / FILE_NAME).rename(tmp_path / "elsewhere.json")
    assert load_calibrations(None, model_dir) == ()
    assert len(load_calibrations(moved, model_dir)) == 1


def test_the_calibration_of_another_model_is_refused(model_dir):
    shipped = default_model_directory() / FILE_NAME
    with pytest.raises(ModelNotSupportedError, match="was made for another model"):
        load_calibrations(shipped, model_dir)
    write(model_dir)
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    with pytest.raises(ModelNotSupportedError, match="sparseserve calibrate"):
        load_calibrations(None, model_dir)


def test_other_weights_make_another_fingerprint(model_dir):
    before = fingerprint(model_dir)
    weights = load_file(weights_file(model_dir))
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, weights_file(model_dir), {"format": "pt"})
    assert fingerprint(model_dir) != before


def test_the_number_of_files_and_the_library_do_not_matter(model_dir):
    before = fingerprint(model_dir)
    weights = load_file(weights_file(model_dir))
    weights_file(model_dir).unlink()
    names = sorted(weights)
    save_file({n: weights[n] for n in names[::2]}, model_dir / "a.safetensors")
    save_file({n: weights[n] for n in names[1::2]}, model_dir / "b.safetensors")
    config = json.loads((model_dir / "config.json").read_text())
    config["transformers_version"] = "99"
    (model_dir / "config.json").write_text(json.dumps(config))
    assert fingerprint(model_dir) == before


@pytest.mark.parametrize("content", ["", "[]", '{"schema_version": 2}'])
def test_what_is_no_calibration_is_refused_in_a_sentence(model_dir, content):
    (model_dir / FILE_NAME).write_text(content)
    with pytest.raises(ModelNotSupportedError, match="no calibration of this release"):
        load_calibrations(None, model_dir)


def test_a_file_that_is_named_must_be_there(model_dir, tmp_path):
    with pytest.raises(ModelNotSupportedError, match="cannot be read"):
        load_calibrations(tmp_path / "missing.json", model_dir)
