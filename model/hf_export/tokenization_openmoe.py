"""OpenMoE's tokenizer for Hugging Face transformers: SentencePiece itself. Others cut some texts otherwise."""

import re
import shutil
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizer

SENTINEL = re.compile(r"<extra_id_(\d+)>")


class OpenMoeTokenizer(PreTrainedTokenizer):
    """A SentencePiece model with UL2's sentinels above its ids: `<extra_id_0>` is the highest, and they descend.

    A sequence begins with id 0, as rows of training do. In a text `<extra_id_k>` is sentinel k, and a space beside it
    that of the next word. All else is text, also `</s>`, which is what chat models were trained with.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, num_sentinels=300, **settings):
        self.vocab_file, self.num_sentinels = str(vocab_file), num_sentinels
        self.processor = sentencepiece.SentencePieceProcessor(model_file=self.vocab_file)
        names = "|".join(map(str, range(num_sentinels)))
        self.cut = re.compile(rf" ?(<extra_id_(?:{names})>) ?")
        super().__init__(num_sentinels=num_sentinels, **({"special_tokens_pattern": "bos"} | settings))

    @property
    def vocab_size(self):
        """Ids that have a meaning; the model has some more rows."""
        return self.processor.vocab_size() + self.num_sentinels

    def get_vocab(self):
        """The ids of all pieces and sentinels."""
        return {self._convert_id_to_token(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def tokenize(self, text, **settings):
        """The pieces and sentinels of a text."""
        tokens = []
        for i, part in enumerate(self.cut.split(text)):
            tokens += [part] if i % 2 else self.processor.encode(part, out_type=str)
        return tokens

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """Id 0, and the ids of one text or two."""
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def convert_tokens_to_string(self, tokens):
        """The text of pieces; sentinels stay as they are, `</s>` and the like have none."""
        text, pieces = "", []
        for token in tokens:
            if SENTINEL.fullmatch(token) or token == "<unused>":
                text, pieces = text + self.processor.decode(pieces) + token, []
            else:
                pieces.append(token)
        return text + self.processor.decode(pieces)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        """Copies the SentencePiece model."""
        copy = Path(save_directory, f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model")
        if copy.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, copy)
        return (str(copy),)

    def _convert_token_to_id(self, token):
        sentinel = SENTINEL.fullmatch(token)
        return self.vocab_size - 1 - int(sentinel[1]) if sentinel else self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index):
        if index < self.processor.vocab_size():
            return self.processor.id_to_piece(index)
        return f"<extra_id_{self.vocab_size - 1 - index}>" if index < self.vocab_size else "<unused>"
