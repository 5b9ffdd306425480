"""Text <-> token ids, streaming, chat templates."""

from pyengine.tokenizer.chat import assistant_mask
from pyengine.tokenizer.stream import StopStrings, StreamDecoder
from pyengine.tokenizer.template import ChatTemplate, TemplateError
from pyengine.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "StopStrings", "StreamDecoder", "TemplateError", "Tokenizer", "assistant_mask"]
