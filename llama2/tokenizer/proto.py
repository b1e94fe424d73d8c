"""SentencePiece's own file, `tokenizer.model` of Llama 1 and 2: a ModelProto.

Reads one into a Vocabulary and builds one from any Vocabulary of kind "spm", so that SentencePiece
itself can run vocabularies that came from GGUF or llama2.c. Source: google/sentencepiece,
sentencepiece_model.proto.
"""

import warnings
from typing import Any

from llama2.errors import TokenizerError
from llama2.tokenizer.vocabulary import BYTE, NORMAL, Source, Vocabulary

WAY_OUT = "the file is damaged or of another kind, fetch it again"


def from_proto(data: bytes, *, name: str) -> Vocabulary:
    """Read the bytes of a `.model` file. Raises TokenizerError on anything but a BPE ModelProto."""
    model = _parse(data, name)
    if not model.pieces or not model.HasField("trainer_spec"):
        raise TokenizerError(f"{name}: not a whole SentencePiece model ({len(model.pieces)} pieces); {WAY_OUT}")
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    if spec.model_type != spec.BPE:
        kind = spec.ModelType.Name(spec.model_type)
        raise TokenizerError(f"{name}: a SentencePiece model of type {kind}; Llama's vocabularies are of type BPE")
    if spec.treat_whitespace_as_suffix:
        raise TokenizerError(f"{name}: treat_whitespace_as_suffix is set; Llama's vocabularies have the space in front")
    if not all(isinstance(piece.piece, str) for piece in model.pieces):
        raise TokenizerError(f"{name}: a piece is not UTF-8; {WAY_OUT}")
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    foreign = normalizer.precompiled_charsmap or not normalizer.escape_whitespaces
    return Vocabulary(
        kind="spm",
        pieces=tuple(piece.piece for piece in model.pieces),
        types=tuple(piece.type for piece in model.pieces),
        scores=tuple(piece.score for piece in model.pieces),
        add_dummy_prefix=normalizer.add_dummy_prefix,
        remove_extra_spaces=normalizer.remove_extra_whitespaces,
        bos_id=ids.get(spec.bos_piece) if spec.bos_id >= 0 else None,
        eos_id=ids.get(spec.eos_piece) if spec.eos_id >= 0 else None,
        unk_id=next((i for i, piece in enumerate(model.pieces) if piece.type == piece.UNKNOWN), None),
        pad_id=ids.get(spec.pad_piece) if spec.pad_id >= 0 else None,
        source=Source("model", data),
        unportable=f"its normalizer {normalizer.name!r} exists only in SentencePiece" if foreign else "",
    )


def to_proto(vocabulary: Vocabulary) -> bytes:
    """Return the bytes of a `.model` file; those it was read from where nothing was added since."""
    assert vocabulary.kind == "spm"
    if vocabulary.source and vocabulary.source.format == "model":
        model = _parse(vocabulary.source.data, "tokenizer.model")
        if not _set_pieces(model, vocabulary):
            return vocabulary.source.data
    else:
        model = _empty()
        _set_pieces(model, vocabulary)
        _set_rules(model, vocabulary)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()


def as_bpe(data: bytes) -> bytes:
    """Return a model of single characters as one of BPE, which splits text alike where there is nothing to merge.

    Scores become ranks, as BPE has them: the logarithm of a character that was never seen is not a number.
    """
    model = _parse(data, "the trained vocabulary")
    model.trainer_spec.model_type = _module().TrainerSpec.BPE
    for rank, piece in enumerate(each for each in model.pieces if each.type == NORMAL):
        piece.score = -float(rank)
    return model.SerializeToString()


def _module() -> Any:
    with warnings.catch_warnings():
        # protobuf's generated code warns about its own age, which no user can mend
        warnings.simplefilter("ignore")
        from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def _empty() -> Any:
    return _module().ModelProto()


def _parse(data: bytes, name: str) -> Any:
    from google.protobuf.message import DecodeError

    model = _empty()
    try:
        model.ParseFromString(data)
    except (DecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{name}: not a SentencePiece model ({error}); {WAY_OUT}") from None
    return model


def _set_pieces(model: Any, vocabulary: Vocabulary) -> bool:
    """Make the model's pieces equal the vocabulary's; say whether anything had to change."""
    changed = False
    for i, wanted in enumerate(zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True)):
        piece = model.pieces[i] if i < len(model.pieces) else model.pieces.add()
        if (piece.piece, piece.score, piece.type) != wanted:
            piece.piece, piece.score, piece.type = wanted
            changed = True
    return changed


def _set_rules(model: Any, vocabulary: Vocabulary) -> None:
    spec = model.trainer_spec
    spec.model_type = spec.BPE
    spec.byte_fallback = BYTE in vocabulary.types
    spec.split_digits = spec.allow_whitespace_only_pieces = True
    for role in ("unk", "bos", "eos", "pad"):
        token_id = getattr(vocabulary, f"{role}_id")
        setattr(spec, f"{role}_id", -1 if token_id is None else token_id)
        if token_id is not None:
            setattr(spec, f"{role}_piece", vocabulary.pieces[token_id])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = vocabulary.add_dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = vocabulary.remove_extra_spaces
