"""Answer from memory with a smaller model that drafts: the text is the same, and it comes sooner where drafts are good.

python docs/examples/generate_with_assistant.py MODEL ASSISTANT BOOK.txt "In the last chapter,"
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from longmem import MemoryBank
from longmem.model.opening import open_model


def main(name: str, assistant: str, book: str, prompt: str, new_tokens: int = 64) -> str:
    """Return how a prompt goes on after a book. The assistant has the tokenizer of the model, and no memory."""
    model = open_model(name)
    bank = MemoryBank.for_model(model)
    model.memorize(bank, Path(book).read_text(encoding="utf-8"), document_id="book")
    draft = AutoModelForCausalLM.from_pretrained(assistant).eval()
    inputs = model.tokenizer(prompt, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, memory=bank, assistant_model=draft, do_sample=False, max_new_tokens=new_tokens)
    return model.tokenizer.decode(ids[0], skip_special_tokens=True)


if __name__ == "__main__":
    print(main(*sys.argv[1:5]))
