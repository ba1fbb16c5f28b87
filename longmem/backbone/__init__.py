"""The frozen backbone: finding its parts, running it, taking its keys free of position.

Nothing is imported here: a name of a model, or a packaged one, is looked up without transformers.
"""
