"""The correctness gate on SGLang's model: at launch, on live samples, and the model as it sees
it."""
