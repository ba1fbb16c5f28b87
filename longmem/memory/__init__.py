"""The memory bank: documents stored as attention keys and values in chunks, found by inner product."""

from longmem.memory.age_prior import AgePrior
from longmem.memory.bank import MemoryBank
from longmem.memory.folder.bank_folder import has_bank
from longmem.memory.reader import BankView
from longmem.memory.rows.documents import DocumentInfo, SourcePart
from longmem.memory.rows.ledger import ChunkPlace
from longmem.memory.shards import BankShards

__all__ = ["AgePrior", "BankShards", "BankView", "ChunkPlace", "DocumentInfo", "MemoryBank", "SourcePart", "has_bank"]
