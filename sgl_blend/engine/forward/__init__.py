"""The blend prefill inside SGLang's model runner: layer slices, attention backend, KV pool."""
