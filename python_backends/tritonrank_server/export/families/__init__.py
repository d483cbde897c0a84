"""The families of models, a module each, and their architectures by transformers' names."""

from .bert import (
    BertForSequenceClassification,
    ElectraForSequenceClassification,
    RobertaForSequenceClassification,
)
from .deberta import DebertaV2ForSequenceClassification
from .distilbert import DistilBertForSequenceClassification
from .family import LabelDifference as LabelDifference
from .family import Reranker as Reranker
from .modernbert import ModernBertForSequenceClassification
from .modules import ENCODERS as ENCODERS
from .modules import Modules as Modules
from .qwen3 import Qwen3ForSequenceClassification

#: Architecture → its model type in transformers, by which that knows what to load; its class here.
FAMILIES: dict[str, tuple[str, type[Reranker]]] = {
    "BertForSequenceClassification": ("bert", BertForSequenceClassification),
    "CamembertForSequenceClassification": ("camembert", RobertaForSequenceClassification),
    "DebertaV2ForSequenceClassification": ("deberta-v2", DebertaV2ForSequenceClassification),
    "DistilBertForSequenceClassification": ("distilbert", DistilBertForSequenceClassification),
    "ElectraForSequenceClassification": ("electra", ElectraForSequenceClassification),
    "ModernBertForSequenceClassification": ("modernbert", ModernBertForSequenceClassification),
    "Qwen3ForCausalLM": ("qwen3", Qwen3ForSequenceClassification),
    "Qwen3ForSequenceClassification": ("qwen3", Qwen3ForSequenceClassification),
    "RobertaForSequenceClassification": ("roberta", RobertaForSequenceClassification),
    "XLMRobertaForSequenceClassification": ("xlm-roberta", RobertaForSequenceClassification),
}
