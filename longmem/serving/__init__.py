"""A model with its memories behind OpenAI's protocol, and a page to talk to it (`longmem serve`)."""
