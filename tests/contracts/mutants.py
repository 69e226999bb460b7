"""Planted bugs: (name, file under contracts/src, what stands there, what a bug would say). Each must be killed.

`scripts/check-mutants` compiles each one and runs the contract tests on it; contracts/INVARIANTS.md keeps the result.
"""

MUTANTS: tuple[tuple[str, str, str, str], ...] = (
    (
        "claim above the allocation",
        "Channels.sol",
        "else if (amount > state.allocated) reason",
        "else if (amount > type(uint128).max - 1) reason",
    ),
    ("claim a lower total", "Channels.sol", "if (amount <= claimed) reason", "if (amount == claimed) reason"),
    ("claim above the voucher", "Channels.sol", "else if (amount > ceiling)", "else if (amount > ceiling + 1)"),
    (
        "claim without a signature",
        "Channels.sol",
        "else if (!config.payerAuthorizer.isValid(voucherDigest(id, ceiling), entry.signature))",
        "else if (entry.signature.length != 65)",
    ),
    ("finalize a second early", "Channels.sol", "block.timestamp < withdrawAt", "block.timestamp + 1 < withdrawAt"),
    ("finalize without a beginning", "Channels.sol", "if (withdrawAt == 0) revert", "if (false) revert"),
    (
        "finalize leaves the gap open",
        "Channels.sol",
        "        state.allocated = claimed;\n",
        "",
    ),
    (
        "release more than was locked",
        "Vault.sol",
        "lockedBy[msg.sender][token] = locked - amount;",
        "lockedBy[msg.sender][token] = locked;",
    ),
    ("settle twice", "Channels.sol", "        owed[receiver][token] = 0;\n", ""),
    ("settle to the hot key", "Channels.sol", "workers.payoutOf(receiver);", "receiver;"),
    ("close takes back what was claimed", "Channels.sol", "if (finalAmount < claimed) revert", "if (false) revert"),
    (
        "close without the receiver",
        "Channels.sol",
        "_requireSigner(id, config.receiverAuthorizer, closeDigest(id, finalAmount), closeSignature);",
        "if (closeSignature.length != 65) revert Channels_BadSignature(id, config.receiverAuthorizer);",
    ),
    (
        "close again",
        "Channels.sol",
        "        if (state.closed) revert Channels_Closed(id);\n        if (state.allocated == 0)",
        "        if (state.allocated == 0)",
    ),
    (
        "anyone begins a withdrawal",
        "Channels.sol",
        "if (msg.sender != config.payer && msg.sender != config.payerAuthorizer)",
        "if (msg.sender == config.receiver)",
    ),
    ("an allocation counts twice", "Channels.sol", "allocated - current;", "allocated;"),
    ("an allocation never expires", "Channels.sol", "block.timestamp >= validBefore", "block.timestamp > validBefore"),
    (
        "allocate in a closing channel",
        "Channels.sol",
        "if (state.withdrawAt != 0) revert Channels_WithdrawPending(id, state.withdrawAt);\n        uint128 current",
        "uint128 current",
    ),
    ("anyone is a module", "Vault.sol", "if (!isModule[msg.sender]) revert", "if (false) revert"),
    ("pause blocks the exit", "Vault.sol", "if (amount == 0) revert", "if (paused || amount == 0) revert"),
    (
        "credit what was asked",
        "Vault.sol",
        "_pull(IERC20(token), amount);",
        "_pull(IERC20(token), amount) * 0 + amount;",
    ),
    ("withdraw keeps the liability", "Vault.sol", "        liabilities[token] -= amount;\n", ""),
    ("seal again", "Vault.sol", "if (isSealed) revert", "if (false) revert"),
    ("wallets burn the batch", "Signatures.sol", "staticcall(MAX_1271_GAS,", "staticcall(gas(),"),
    ("a wallet's short answer is a yes", "Signatures.sol", "gt(returndatasize(), 0x1f)", "gt(returndatasize(), 3)"),
    (
        "a retired key can be taken",
        "Workers.sol",
        "record.active || (record.owner != address(0) && record.owner != msg.sender)",
        "record.active",
    ),
    ("a consent works twice", "Workers.sol", "record.nonce += 1;", ""),
)
