"""Measure the perplexity of long documents, by length and by how far back lies what memory helps to predict; or of books.

    python eval/eval_perplexity.py perplexity data=my-books output=results/my-books
    python eval/eval_perplexity.py perplexity data=books/manifest.json split=test limit=null model=my-longmem \\
        "systems=[backbone,context-8192,off,on,wrong]" output=results/test-books
    python eval/eval_perplexity.py perplexity data=allenai/some-corpus num_documents=100 \\
        windows_per_document=null memory_tokens=null output=results/every-token
    python eval/eval_perplexity.py perplexity-books data=my-books "other_cuts=[1024/512]" grow=true \\
        "systems=[backbone,off,on,wrong,context-8192]" context_windows=2 output=results/both-cuts

A document is read in windows whose last `stride` tokens are scored, by all systems on the same tokens. Everything before a
window is in the document's memory, up to `memory_tokens`. Of a book one stretch is scored, after at least `memory_tokens`, by
every way of cutting windows and by the backbone with longer ones. The wrong memory is the next text's, that of a single text
Python's manual. The losses of every token are in OUTPUT/documents. A stopped run goes on with the same command.
"""

import sys

from longmem.cli.eval import run_script

if __name__ == "__main__":
    task, *overrides = sys.argv[1:] or ["--help"]
    run_script(task, overrides, __doc__)
