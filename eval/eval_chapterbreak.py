"""Which of six passages begins the next chapter? ChapterBreak suffix identification at several lengths of context.

    python eval/eval_chapterbreak.py data=my.json output=results/chapterbreak limit=40
    python eval/eval_chapterbreak.py data=simsun131/chapterbreak split=pg19 \\
        "contexts=[256,1024,8192]" "systems=[backbone,context-8192,on]" output=results/pg19

experiments/chapterbreak makes such data from books of your own. A run that was stopped goes on with the same command.
"""

import sys

from longmem.cli.eval import run_script

if __name__ == "__main__":
    run_script("chapterbreak", sys.argv[1:], __doc__)
