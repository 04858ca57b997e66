"""From logits to tokens to text: the generator, sampling, structured output, drafting, scoring."""
