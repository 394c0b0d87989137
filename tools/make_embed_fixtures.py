#!/usr/bin/env python3
"""Makes tests/fixtures/embed/ : what sentence-transformers says about the texts in texts.json.

In: texts.json (kept by hand, 50 texts) and the default embedding model (tools/get_default_embedder.sh).
Out, each file a matrix [text][dim] of little-endian f32, L2-normalised:
  minilm.f32          all-MiniLM-L6-v2, real weights (not committed)
  tiny-xlmr.f32       the model in tiny-xlmr/: XLM-RoBERTa, CLS pooling, weights in two shards, random
  tiny-bert-cls.f32   the model in tiny-bert-cls/: BERT, CLS pooling, weights in bf16 under `bert.`, random
The texts are run one by one, so that padding cannot matter. The tiny models' tokenizer.json files are trained once and then
kept (training them is not deterministic); everything else is made again. Same versions, same bytes.

Needs: pip install numpy torch transformers tokenizers safetensors sentence-transformers
Usage: tools/make_embed_fixtures.py [--model models/all-MiniLM-L6-v2]
"""

import argparse
import json
import pathlib
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "tests" / "fixtures" / "embed"
MAX_SEQ_LENGTH = 64
SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def embed(directory, texts, name):
    model = SentenceTransformer(str(directory), device="cpu", model_kwargs={"torch_dtype": torch.float32})
    model.eval()
    vectors = np.concatenate([model.encode([text], normalize_embeddings=True) for text in texts])
    vectors.astype("<f4").tofile(OUT / name)
    print(name, vectors.shape, "max_seq_length", model.max_seq_length)


def randomise(model, round_to=None):
    """Every parameter counts: biases and norms too, which are 0 and 1 in a fresh model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3)
            if name.endswith("LayerNorm.weight"):
                parameter.add_(1.0)
            if round_to is not None:
                parameter.copy_(parameter.to(round_to).float())


def kept(directory, train, texts):
    """The directory's tokenizer, or a newly trained one."""
    path = directory / "tokenizer.json"
    if not path.exists():
        return train(texts)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def wrap(tokenizer, **special):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_SEQ_LENGTH, **special)


def train_xlmr(texts):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def xlmr_tokenizer(directory, texts):
    return wrap(
        kept(directory, train_xlmr, texts), bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>",
    )


def train_bert(texts):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def bert_tokenizer(directory, texts):
    return wrap(
        kept(directory, train_bert, texts), cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        mask_token="[MASK]",
    )


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def sentence_files(directory):
    """The older form of the files that sentence-transformers adds, which the published bge models have."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    write_json(
        directory / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(kinds)
        ],
    )
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": MAX_SEQ_LENGTH, "do_lower_case": False})
    modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"]
    pooling = {f"pooling_mode_{mode}": mode == "cls_token" for mode in modes}
    write_json(
        directory / "1_Pooling" / "config.json", {"word_embedding_dimension": SHAPE["hidden_size"], **pooling}
    )


def fresh(name):
    """The model's directory, empty but for its tokenizer."""
    directory = OUT / name
    directory.mkdir(parents=True, exist_ok=True)
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "tokenizer.json":
            entry.unlink()
    return directory


def tiny_xlmr(texts):
    torch.manual_seed(1)
    directory = fresh("tiny-xlmr")
    tokenizer = xlmr_tokenizer(directory, texts)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=MAX_SEQ_LENGTH + 2, type_vocab_size=1, pad_token_id=1,
        layer_norm_eps=1e-5, **SHAPE,
    )
    model = XLMRobertaModel(config, add_pooling_layer=False)
    randomise(model)
    model.save_pretrained(directory, max_shard_size="80KB")
    assert (directory / "model.safetensors.index.json").exists(), "expected shards"
    tokenizer.save_pretrained(directory)
    sentence_files(directory)
    embed(directory, texts, "tiny-xlmr.f32")


def tiny_bert(texts):
    torch.manual_seed(2)
    directory = fresh("tiny-bert-cls")
    tokenizer = bert_tokenizer(directory, texts)
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=MAX_SEQ_LENGTH, type_vocab_size=2, pad_token_id=0, **SHAPE
    )
    model = BertModel(config, add_pooling_layer=False)
    randomise(model, round_to=torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    sentence_files(directory)
    embed(directory, texts, "tiny-bert-cls.f32")
    path = directory / "model.safetensors"
    halves = {f"bert.{name}": tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
    save_file(halves, path, metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "models" / "all-MiniLM-L6-v2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    texts = json.loads((OUT / "texts.json").read_text())
    embed(arguments.model, texts, "minilm.f32")
    tiny_xlmr(texts)
    tiny_bert(texts)


if __name__ == "__main__":
    main()
