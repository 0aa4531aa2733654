"""UMT5, the text encoder of Wan2.1: tokenizer, encoder, and stored embeddings."""
