"""What tests need and a user's own tests may: closed-form truths, an n-rank runner, contract suites."""
