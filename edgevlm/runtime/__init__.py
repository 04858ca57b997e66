"""All that touches OpenVINO: the core, loading, compile cache, vision encoder, language model, KV sessions."""
