"""Who may say what exists and what runs: TUF roles, their keys, the verifying client, the repository, bundles."""
