"""The content-addressed model store: manifests, conversion from GGUF, tokenizer and chat template. No torch here."""
