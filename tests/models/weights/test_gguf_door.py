"""A GGUF file wherever a model in Hugging Face's form is taken."""

import shutil

import pytest
import torch
from gguf_files import tiny_model

from config.user_error import UserError
from models.families import load_pretrained
from models.weights.gguf_writer import write_gguf
from models.weights.huggingface import describe_pretrained
from models.weights.pretrained import our_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_model(folder)
    (folder / "alone").mkdir()
    write_gguf(folder, folder / "alone" / "tiny.gguf", "f16")
    return folder


@pytest.mark.parametrize("form", ["file", "folder"])
@torch.no_grad()
def test_a_file_is_the_model_that_it_was_made_from(whole, form, tmp_path):
    argument = str(whole / "alone" / "tiny.gguf" if form == "file" else whole / "alone")
    assert our_checkpoint(argument, str(tmp_path), "-p") is None
    expected, found = load_pretrained(str(whole)).eval(), load_pretrained(argument).eval()
    ids = torch.arange(60)[None] % found.config.vocab_size
    torch.testing.assert_close(found(ids), expected(ids), atol=1e-2, rtol=1e-2)
    ours, theirs = (describe_pretrained(a).tokenizer("-p")[0] for a in (argument, str(whole)))
    text = "It's 1234 o'clock,\n  <|im_end|> na\u00efve"
    assert ours.encode(text) == theirs.encode(text) and ours.stop_ids == theirs.stop_ids
    assert ours.name == ("tiny" if form == "file" else "alone")


def test_a_file_in_a_folder_of_transformers_is_not_taken_for_it(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "both")
    shutil.copy(whole / "alone" / "tiny.gguf", folder)
    assert describe_pretrained(str(folder)).gguf is None


def test_what_is_wrong_names_the_flag_and_the_file(whole, tmp_path):
    data = (whole / "alone" / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"^-p {tmp_path}/cut.gguf: is damaged") as error:
        load_pretrained(str(tmp_path / "cut.gguf"))
    assert str(error.value).count(str(tmp_path)) == 1
