"""One request from its body to its response: options, admission, plan, store, report."""
