"""Question answering over long documents and conversations: QuALITY and LoCoMo."""

from longmem.evaluation.qa.documents import Document, Item, choose_items
from longmem.evaluation.qa.locomo import read_locomo
from longmem.evaluation.qa.plan import DocumentPlan, describe_plans, plan_documents
from longmem.evaluation.qa.quality import read_quality
from longmem.evaluation.qa.reader import answer_documents
from longmem.evaluation.qa.run import evaluate_qa
from longmem.evaluation.qa.scores import summarize_locomo, summarize_qa, summarize_quality
from longmem.evaluation.qa.settings import QASettings, read_documents
from longmem.evaluation.qa.tables import markdown, panels_of, sections

__all__ = [
    "Document",
    "DocumentPlan",
    "Item",
    "QASettings",
    "answer_documents",
    "choose_items",
    "describe_plans",
    "evaluate_qa",
    "markdown",
    "panels_of",
    "plan_documents",
    "read_documents",
    "read_locomo",
    "read_quality",
    "sections",
    "summarize_locomo",
    "summarize_qa",
    "summarize_quality",
]
