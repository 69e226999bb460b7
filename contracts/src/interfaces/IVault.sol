// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title The ledger that holds every coin of Gristmill
/// @notice Accounts deposit once; modules (Channels, Jobs, Workers, Disputes, Committee) move entries between accounts and
/// their own locks, never coins. Coins leave by `withdraw` only, and only to the order of the account that owns them.
/// The native coin is token `address(0)`. Amounts are in the smallest unit of their token.
interface IVault {
    error Vault_ZeroAddress();
    error Vault_ZeroAmount();
    error Vault_BadRecipient(address to);
    error Vault_WrongValue(uint256 expected, uint256 sent);
    error Vault_TokenNotAllowed(address token);
    error Vault_Insufficient(address token, address account, uint256 balance, uint256 wanted);
    error Vault_ReleaseExceedsLocked(address module, address token, uint256 locked, uint256 wanted);
    error Vault_NotModule(address caller);
    error Vault_NotDeployer(address caller);
    error Vault_NotSealed();
    error Vault_AlreadySealed();
    error Vault_NotAContract(address module);
    error Vault_Paused();

    event Deposited(address indexed token, address indexed from, address indexed beneficiary, uint256 amount);
    event Withdrawn(address indexed token, address indexed account, address indexed to, uint256 amount);
    event Locked(address indexed module, address indexed token, address indexed from, uint256 amount);
    event Released(address indexed module, address indexed token, address indexed to, uint256 amount);
    event TokenSet(address indexed token, bool allowed);
    event PausedSet(address indexed by, bool paused);
    event Sealed(address[] modules);

    /// @notice Credits `beneficiary` with what really arrived, which a token with a transfer fee makes less than `amount`.
    /// Warning: rebasing tokens must never be allow-listed: the ledger does not follow their balances.
    /// @param token An allow-listed ERC-20 that the caller has approved, or `address(0)` with `msg.value == amount`.
    function deposit(address token, uint256 amount, address beneficiary) external payable returns (uint256 credited);

    /// @notice As `deposit`, with an EIP-2612 permit in the same transaction. The permit is tried and its failure ignored:
    /// somebody may have used it first (it is public), and then the allowance is there all the same.
    /// Warning: only ERC-20; the caller is whose tokens are pulled and must be the permit's owner.
    function depositWithPermit(
        address token,
        uint256 amount,
        address beneficiary,
        uint256 deadline,
        uint8 v,
        bytes32 r,
        bytes32 s
    ) external returns (uint256 credited);

    /// @notice Deposits by an EIP-3009 `receiveWithAuthorization` that `from` signed for this vault. Anyone may submit; the
    /// credit always goes to `from`, so the submitter can not redirect it.
    function depositWithAuthorization(
        address token,
        address from,
        uint256 amount,
        uint256 validAfter,
        uint256 validBefore,
        bytes32 nonce,
        uint8 v,
        bytes32 r,
        bytes32 s
    ) external returns (uint256 credited);

    /// @notice Pays `amount` of the caller's balance to `to`. Can not be paused, and works for tokens no longer listed.
    function withdraw(address token, uint256 amount, address to) external;

    /// @notice Module only: moves `amount` from the free balance of `from` into the lock of the calling module.
    /// Warning: a module must have the consent of `from`; the vault can not check it.
    function lock(address token, address from, uint256 amount) external;

    /// @notice Module only: as `lock`, but not stopped by a pause: posting the bond of a dispute is part of a way out.
    function lockBond(address token, address from, uint256 amount) external;

    /// @notice Module only: moves `amount` out of the calling module's own lock to the free balance of `to`.
    /// Never more than that module holds, so a fault in one module can not reach the funds of another or of an account.
    function release(address token, address to, uint256 amount) external;

    /// @notice Names the modules, once and for ever. Only the deployer; no deposit is possible before.
    /// Warning: there is no way to add, replace or remove a module later. A new module needs a new vault.
    function seal(address[] calldata modules) external;

    /// @notice TOKEN_ADMIN: which tokens may be deposited. Taking a token off the list blocks new deposits, nothing else.
    function setToken(address token, bool allowed) external;

    /// @notice GUARDIAN: stops new deposits and new locks (not bonds), or allows them again. No exit is ever blocked.
    /// Warning: a pause stops no clock: deadlines, windows and delays run on. Who must answer in time (a client with its bond)
    /// needs the balance in the vault beforehand.
    function setPaused(bool paused_) external;

    function balanceOf(address token, address account) external view returns (uint256);

    /// @notice Sum of all balances and locks of `token`: what the vault owes. Its coins are never less.
    function liabilities(address token) external view returns (uint256);

    function lockedBy(address module, address token) external view returns (uint256);

    function isModule(address account) external view returns (bool);

    function isTokenAllowed(address token) external view returns (bool);

    function isSealed() external view returns (bool);

    function paused() external view returns (bool);
}
