"""A bank as a LlamaIndex retriever: passages that the model's own heads, or words, find for a question.

    retriever = BankRetriever(bank, model, k=4)
    nodes = retriever.retrieve("What is my locker code?")

Needs: pip install llama-index-core.
"""

from typing import Any

from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode


class BankRetriever(BaseRetriever):
    """Finds passages in `bank`; without a `model`, words choose."""

    def __init__(self, bank: Any, model: Any = None, k: int = 4) -> None:
        self.bank, self.model, self.k = bank, model, k
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [
            NodeWithScore(
                node=TextNode(
                    text=passage.text,
                    metadata={"source": passage.document_id, "start": passage.start, "stop": passage.stop},
                ),
                score=passage.score,
            )
            for passage in self.bank.find(query_bundle.query_str, self.model, self.k)
        ]
