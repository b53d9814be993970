"""GGUF files that are read: what is refused in one line, and tokenizers of every kind that is known."""

import importlib.util

import gguf
import numpy as np
import pytest
import torch
from gguf_files import tiny_model
from transformers import AutoTokenizer, LlamaForCausalLM

from config.user_error import UserError
from models.weights.gguf import halves_from_pairs, pairs_from_halves, read_gguf
from models.weights.gguf_writer import write_gguf
from utils.tokenizers.huggingface import HuggingFaceTokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_model(folder)
    write_gguf(folder, folder / "m.gguf", "f16")
    return folder / "m.gguf"


def changed(whole, path, keys=(), tensors=(), drop=(), arch="llama"):
    """A copy of a file with other metadata and tensors."""
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(path, arch)
    new = dict(keys)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in drop:
            continue
        value = new.pop(name) if name in new else field.contents()
        writer.add_key_value(name, value, field.types[0], sub_type=field.types[1] if len(field.types) > 1 else None)
    for name, value in new.items():
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](name, value)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, value in dict(tensors).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_pairs_and_halves_are_each_others_inverse_and_order_rows_as_llama_cpp_does():
    rows = np.arange(8)  # two heads of four channels
    assert pairs_from_halves(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    weight = np.random.default_rng(0).normal(size=(24, 5))
    assert (halves_from_pairs(pairs_from_halves(weight, 3), 3) == weight).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"arch": "qwen2"}, "of the architecture qwen2; one of llama is needed"),
        ({"keys": {"split.count": 3}}, "is one of several parts"),
        ({"keys": {"llama.expert_count": 8}}, "has llama.expert_count"),
        ({"keys": {"llama.attention.key_length": 16}}, "heads of several sizes"),
        ({"keys": {"llama.block_count": 2**31}}, "no tensors of 2147483648 layers"),
        ({"keys": {"llama.block_count": 1}}, "has tensors that a plain LLaMA has not: blk.1."),
        ({"keys": {"llama.feed_forward_length": 65}}, "ffn_gate.weight has the shape (64, 32)"),
        ({"keys": {"llama.embedding_length": 0}}, "has 0 llama.embedding_length"),
        ({"drop": ["llama.context_length"]}, "has no llama.context_length"),
        ({"drop": ["blk.1.ffn_up.weight"]}, "blk.1.ffn_up.weight is missing"),
        ({"drop": ["token_embd.weight"]}, "is damaged"),
        ({"tensors": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}}, "a plain LLaMA has not: blk.0.attn_q_norm"),
        ({"keys": {"llama.rope.scaling.type": "yarn"}}, "by the method yarn"),
        ({"tensors": {"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}}, "that is not Llama 3's"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_told_by_name(whole, tmp_path, changes, told):
    path = changed(whole, tmp_path / "x.gguf", **changes)
    with pytest.raises(UserError) as error:
        read_gguf(path)
    assert str(error.value).startswith(f"{path}: ") and told in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"keys": {"tokenizer.ggml.pre": "deepseek-llm"}}, "splits text as deepseek-llm does; gpt-2, smollm"),
        ({"keys": {"tokenizer.ggml.model": "bert"}}, "its tokenizer is of kind bert"),
        ({"keys": {"tokenizer.ggml.eos_token_id": 999}}, "eos_token"),
        ({"keys": {"tokenizer.ggml.merges": ["no merge", "of these"]}}, "merges"),
        ({"drop": ["tokenizer.ggml.merges"]}, "merges"),
        ({"drop": ["tokenizer.ggml.tokens"]}, "has no tokenizer"),
    ],
)
def test_a_tokenizer_that_is_not_read_is_told_by_name(whole, tmp_path, changes, told):
    found = read_gguf(changed(whole, tmp_path / "x.gguf", **changes))  # the model can be read
    with pytest.raises(UserError) as error:
        found.tokenizer()
    assert str(error.value).startswith(str(tmp_path)) and told in str(error.value)


def test_other_files_are_refused(whole, tmp_path):
    file = tmp_path / "x.gguf"
    for text, told in ((b"", "no GGUF file"), (b"GGML" * 9, "no GGUF file"), (b"GGUF", "damaged"),
                       (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS")):  # fmt: skip
        file.write_bytes(text)
        with pytest.raises(UserError, match=told):
            read_gguf(file)
    with pytest.raises(UserError, match="No such file"):
        read_gguf(tmp_path / "gone.gguf")
    with pytest.raises(UserError, match="cannot be read"):
        read_gguf(tmp_path)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_told(whole, tmp_path, share):
    data = whole.read_bytes()
    (tmp_path / "x.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="x.gguf: is damaged or cut short"):
        read_gguf(tmp_path / "x.gguf").state()


def test_a_length_beyond_the_end_of_the_file_is_told_at_once(whole, tmp_path):
    """Of an array of numbers: the gguf package would go on reading nothing, some 2^56 times."""
    data = bytearray(whole.read_bytes())
    place = data.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 4 + 4  # two types, length
    data[place + 7] = 1
    (tmp_path / "x.gguf").write_bytes(data[: place + 8 + 4 * 1000])  # after a whole number of them
    with pytest.raises(UserError, match="is damaged or cut short .nothing at byte"):
        read_gguf(tmp_path / "x.gguf")


def test_flipped_bytes_never_end_in_a_traceback(whole, tmp_path):
    """In the metadata, which say where everything is."""
    data, random = whole.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data)
        for place in random.integers(4, 3000, 3):
            broken[place] = random.integers(256)
        (tmp_path / "x.gguf").write_bytes(broken)
        try:
            found = read_gguf(tmp_path / "x.gguf")
            found.state(), found.tokenizer()
        except UserError as error:
            assert str(error).startswith(str(tmp_path))


def test_numbers_that_are_none_are_told(whole, tmp_path):
    norm = np.full(32, np.nan, np.float32)
    path = changed(whole, tmp_path / "x.gguf", drop=["output_norm.weight"], tensors={"output_norm.weight": norm})
    with pytest.raises(UserError, match="holds NaN or infinity"):
        read_gguf(path).state()


def test_without_the_package_the_remedy_is_told(whole, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf==0.19.0"):
        read_gguf(whole)


def test_smollm_reads_digits_one_by_one(whole):
    tokenizer = read_gguf(whole).tokenizer()
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234")] == ["1", "2", "3", "4"]
    line = "\n 5"  # GPT-2's splits keep the space with the digit
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(line)[0][0] == "\u010a\u0120"


def test_the_folder_that_is_saved_loads_everywhere(whole, tmp_path):
    read_gguf(whole).save(tmp_path, torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == 2
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    chat = theirs.apply_chat_template([{"role": "user", "content": "egg"}], return_dict=True)["input_ids"]
    assert chat == [1, *theirs.encode("egg"), 2]
    ours = HuggingFaceTokenizer(tmp_path)
    text = "egg <|im_end|> 1234\n 5<|endoftext|>"
    assert ours.eos_id == 2 and not {0, 1, 2} & set(ours.encode(text)) and ours.decode(ours.encode(text)) == text


def test_a_byte_level_tokenizer_adds_bos_where_the_file_says_so(whole, tmp_path):
    assert read_gguf(whole).tokenizer().encode("egg")[0] != 1
    writer_keys = {"tokenizer.ggml.add_bos_token": True}
    assert read_gguf(changed(whole, tmp_path / "x.gguf", keys=writer_keys)).tokenizer().encode("egg")[0] == 1


def test_sentencepiece_is_read_from_its_scores(whole, tmp_path):
    """As Llama 2 and TinyLlama have it: a space before every text, best score first, bytes for what is unknown."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "e", "g", "h", "n", "he", "gg",
              "\u2581e", "hen", "\u2581hen", "eg"]  # fmt: skip
    scores = [0.0] * 259 + [-9.0] * 5 + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259)
    count = len(read_gguf(whole).tokenizer())
    fill = [f"[PAD{i}]" for i in range(count - len(pieces))]
    keys = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces + fill, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.token_type": types + [5] * len(fill), "tokenizer.ggml.scores": scores + [0.0] * len(fill),
    }  # fmt: skip
    drop = ["tokenizer.ggml.merges", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_bos_token"]
    tokenizer = read_gguf(changed(whole, tmp_path / "x.gguf", keys, drop=drop)).tokenizer()
    assert len(tokenizer) == len(pieces)
    assert tokenizer.tokenize("hen egg") == ["\u2581hen", "\u2581e", "gg"]
    assert tokenizer.encode("hen")[0] == 1
    accent = tokenizer.encode("\u00e9", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(accent) == ["\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(accent) == "\u00e9"
