"""Examples in ChapterBreak's format from books of one's own."""
