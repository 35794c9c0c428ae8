"""Parameter-efficient methods: attach, merge, count."""
