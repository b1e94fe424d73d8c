"""The smallest Llama 2 vocabulary, and a shape to go with it."""

from llama2.model.config import ModelConfig
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, Vocabulary

POCKET = ModelConfig(dim=64, n_layers=2, n_heads=4, vocab_size=260, ffn_dim=172, n_kv_heads=2, context_length=256)


def pocket_tokenizer() -> Tokenizer:
    """Return a vocabulary of unknown, begin, end, the 256 bytes, and the space."""
    pieces = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581")
    types = (UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, NORMAL)
    return Tokenizer(
        Vocabulary("spm", pieces, types, scores=(0.0,) * 260, bos_id=1, eos_id=2, unk_id=0, add_dummy_prefix=True)
    )
