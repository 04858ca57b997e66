"""How the default model `panel` is made: pictures, trainer, evaluation. Not installed."""
