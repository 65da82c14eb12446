"""From files to examples: sources, tokenizer, chat rendering, and the order in which examples are drawn."""
