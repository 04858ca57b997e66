"""Inputs of the submodels: pictures, tokenizer, chat template, prompt, vision cache. No OpenVINO."""
