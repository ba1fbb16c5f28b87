"""Measure the perplexity of long documents, by their length and by how far back lies what memory helps to predict; or of books.

    python eval/eval_perplexity.py configs/eval/perplexity.yaml data=my-books output=results/my-books
    python eval/eval_perplexity.py configs/eval/perplexity.yaml data=books/manifest.json split=test limit=null \\
        model=my-longmem "systems=[backbone,context-8192,off,on,wrong]" output=results/test-books
    python eval/eval_perplexity.py configs/eval/perplexity.yaml data=allenai/some-corpus num_documents=100 \\
        windows_per_document=null memory_tokens=null output=results/every-token
    python eval/eval_perplexity.py configs/eval/perplexity-books.yaml data=my-books "other_cuts=[1024/512]" grow=true \\
        "systems=[backbone,off,on,wrong,context-8192]" context_windows=2 output=results/both-cuts

A document is read in windows whose last `stride` tokens are scored, by all systems on the same tokens. Everything before a
window is in the document's memory, up to `memory_tokens`. With `plan: books` one stretch of each text is scored, after at least
`memory_tokens`, by every way of cutting windows and by the backbone with longer ones. The wrong memory is the next text's, that
of a single text Python's manual. The losses of every token are in OUTPUT/documents. A stopped run goes on, with the same
command, with the texts that are not finished.
"""

from longmem.cli.common import console_for
from longmem.evaluation.perplexity import PerplexitySettings, run_perplexity
from longmem.evaluation.settings import read_arguments
from longmem.plots import plot_perplexity, require_matplotlib


def main() -> None:
    settings = read_arguments(PerplexitySettings, __doc__)
    require_matplotlib()
    found = run_perplexity(settings, console_for(as_json=False, markup=True))
    plot_perplexity(settings.output, found)


if __name__ == "__main__":
    main()
