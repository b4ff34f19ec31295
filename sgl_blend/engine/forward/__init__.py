"""The blend prefill inside SGLang's model runner: passes, attention backend, KV pool."""
