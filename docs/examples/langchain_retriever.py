"""A bank as a LangChain retriever: passages that the model's own heads, or words, find for a question.

    retriever = BankRetriever(bank=bank, model=model, k=4)
    documents = retriever.invoke("What is my locker code?")

Needs: pip install langchain-core.
"""

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever


class BankRetriever(BaseRetriever):
    """Finds passages in `bank`; without a `model`, words choose."""

    bank: Any
    model: Any = None
    k: int = 4

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        found = self.bank.find(query, self.model, self.k)
        return [
            Document(
                page_content=passage.text,
                metadata={
                    "source": passage.document_id,
                    "start": passage.start,
                    "stop": passage.stop,
                    "score": passage.score,
                },
            )
            for passage in found
        ]
