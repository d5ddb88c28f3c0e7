"""T5, an encoder-decoder: its network and its layers, with T5X's parameter tree."""
