// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title Registry of workers: who owns a hot key, where its earnings go, and the stake that answers for it
/// @notice The hot key lives on the worker's machine and is its peer identity; the owner is cold. Earnings of a hot key
/// are paid to its payout address, so a stolen machine can not take them.
/// Stake is held per owner and token, in the lock of this module in the vault. It is active or unbonding; both answer for
/// all hot keys that the owner ever registered. A slash is booked first and moves after `SLASH_DELAY`, in which a guardian
/// may cancel it. Of every slash the victim gets half, the reporter a quarter, and the rest is burnt, so that slashing
/// oneself never pays.
/// Modules (Channels, Jobs, Disputes: what the vault was sealed with) trust each other; nobody else can lock or slash.
interface IWorkers {
    /// @param owner Cold account; zero when the key was never registered.
    /// @param active False after `revoke` or when `rotate` replaced the key.
    /// @param payout Where `Channels.settle` pays this key's earnings, before and after retirement.
    /// @param nonce Number of consents used; the next consent must carry it.
    struct Worker {
        address owner;
        bool active;
        address payout;
        uint256 nonce;
    }

    /// @param active Works for the owner and can be slashed.
    /// @param unbonding On its way out; can still be slashed.
    /// @param freeAt Time from which `withdrawStake` may take the unbonding part.
    /// @param held Sum of the penalties of open jobs: can not be withdrawn.
    /// @param exposure Most that may be held at once; set by the owner, zero at first.
    struct Stake {
        uint128 active;
        uint128 unbonding;
        uint128 held;
        uint128 exposure;
        uint40 freeAt;
    }

    /// @param capability Hash of the canonical signed benchmark document; zero when none was announced.
    /// @param version Rises with each announcement.
    /// @param validUntil Time after which nobody should rely on it.
    struct Capability {
        bytes32 capability;
        uint64 version;
        uint40 validUntil;
    }

    enum SlashState {
        None,
        Booked,
        Moved,
        Cancelled
    }

    /// @param cause Id of what was judged: a job id, or the digest of the second receipt of an equivocation.
    struct Slash {
        address owner;
        address token;
        uint128 amount;
        address victim;
        address reporter;
        uint40 movesAt;
        SlashState state;
        bytes32 cause;
    }

    error Workers_ZeroAddress();
    error Workers_Expired(uint40 deadline, uint256 now_);
    error Workers_HotKeyTaken(address hotKey, address owner);
    error Workers_NotOwner(address hotKey, address caller);
    error Workers_NotActive(address hotKey);
    error Workers_BadSignature(address hotKey);

    error Workers_NotAContract(address account);
    error Workers_NotModule(address caller);
    error Workers_NotGuardian(address caller);
    error Workers_NotHotKeyOrOwner(address hotKey, address caller);
    error Workers_VersionNotHigher(address hotKey, uint64 current, uint64 given);
    error Workers_Convicted(address hotKey);
    error Workers_ZeroAmount();
    error Workers_StakeTooLow(address owner, address token, uint256 available, uint256 wanted);
    error Workers_OverExposure(address owner, address token, uint256 exposure, uint256 wanted);
    error Workers_NothingFree(address owner, address token);
    error Workers_TooEarly(uint256 readyAt, uint256 now_);
    error Workers_NotBooked(uint256 slashId);
    error Workers_TooLate(uint256 slashId, uint40 movesAt);

    event Registered(address indexed hotKey, address indexed owner, address indexed payout);
    event PayoutSet(address indexed hotKey, address previous, address indexed payout);
    event Revoked(address indexed hotKey, address indexed owner);
    event Rotated(address indexed previous, address indexed hotKey, address indexed owner);

    event Announced(address indexed hotKey, bytes32 indexed capability, uint64 version, uint40 validUntil, string uri);
    event Convicted(address indexed hotKey, address indexed owner, bytes32 cause);
    event Staked(address indexed owner, address indexed token, uint128 amount);
    event Unstaked(address indexed owner, address indexed token, uint128 amount, uint40 freeAt);
    event StakeWithdrawn(address indexed owner, address indexed token, uint128 amount);
    event ExposureSet(address indexed owner, address indexed token, uint128 exposure);
    event EarningsLocked(address indexed owner, address indexed token, uint128 amount, uint256 epoch);
    event Held(address indexed owner, address indexed token, uint128 amount, uint128 held);
    event LetGo(address indexed owner, address indexed token, uint128 amount, uint128 held);
    event SlashBooked(
        uint256 indexed slashId,
        address indexed owner,
        address indexed token,
        uint128 amount,
        address victim,
        address reporter,
        uint40 movesAt,
        bytes32 cause
    );
    event SlashMoved(uint256 indexed slashId, uint128 toVictim, uint128 toReporter, uint128 burnt);
    event SlashCancelled(uint256 indexed slashId, address indexed guardian);

    /// @notice Registers `hotKey` as a worker of the caller. Also brings back a key the caller had retired.
    /// Warning: a key once registered belongs to that owner for ever, so that whoever steals a retired key can not
    /// redirect what it is still owed.
    /// @param signature By `hotKey` over HotKey{owner: caller, hotKey, payout, nonce, deadline}.
    function register(address hotKey, address payout, uint40 deadline, bytes calldata signature) external;

    /// @notice Owner only, for active and retired keys: where earnings of `hotKey` go from now on.
    function setPayout(address hotKey, address payout) external;

    /// @notice Owner only: retires `hotKey` and registers `newHotKey` with the same payout.
    /// @param signature By `newHotKey`, as for `register`, over the payout of `hotKey`.
    function rotate(address hotKey, address newHotKey, uint40 deadline, bytes calldata signature) external;

    /// @notice Owner only: retires `hotKey`. Its payout address stays. What the key signed answers with the stake for
    /// `UNBONDING` longer, as a stake does that begins to leave now; after that nothing is slashed for it.
    function revoke(address hotKey) external;

    /// @notice Hot key or its owner (any key for itself when it was never registered): commits to a benchmark document.
    /// @param uri Where the document can be found; only in the event.
    function announce(address hotKey, bytes32 capability, uint64 version, uint40 validUntil, string calldata uri) external;

    /// @notice Moves `amount` of the caller's vault balance into its active stake.
    function stake(address token, uint128 amount) external;

    /// @notice Starts the way out for `amount` of the caller's active stake. It stays slashable until it is withdrawn.
    /// Warning: a second call restarts the delay for all that is unbonding.
    function unstake(address token, uint128 amount) external;

    /// @notice After the delay: moves the caller's unbonding stake back to its vault balance, but for what is held by open
    /// jobs or locked by recent earnings. What stays can be taken later without a new delay.
    /// Warning: from `freeAt` on this part can leave at any moment, ahead of a proof too. Who looks at a stake before trusting
    /// it counts `active` alone.
    function withdrawStake(address token) external returns (uint128 amount);

    /// @notice The most of the caller's stake that open jobs of all its hot keys may hold at once. A hot key signs quotes
    /// with penalties by itself, so this bounds what a stolen machine can lose: each slash uses it up, and the owner sets it
    /// anew.
    /// Warning: it is the loss that the owner allows: who has a hot key can sign quotes and break them, up to this much in each
    /// token. It does not bound what equivocation costs, which is half of the stake, and a lower one frees nothing that is held.
    function setExposure(address token, uint128 exposure) external;

    /// @notice After `movesAt`: pays a booked slash out. Anyone may call.
    function moveSlash(uint256 slashId) external;

    /// @notice GUARDIAN of the vault, before `movesAt`: gives a booked slash back to the owner's active stake, and to nobody
    /// else.
    function cancelSlash(uint256 slashId) external;

    /// @notice Module only (Channels): locks a share of the stake behind `hotKey` for one to two `EARNINGS_WINDOW`s because it was paid
    /// `earned`. Locks at most what earnings do not lock yet, held or not; never reverts, so that no payment hangs on it.
    function lockForEarnings(address hotKey, address token, uint256 earned) external;

    /// @notice Module only: holds `amount` of the stake behind `hotKey` for an open job.
    function hold(address hotKey, address token, uint128 amount) external;

    /// @notice Module only: ends a hold.
    function letGo(address hotKey, address token, uint128 amount) external;

    /// @notice Module only: books a slash of at most `amount`, the stake and `SLASH_CAP` of it, unbonding part first.
    /// Nothing is booked (id 0) when there is no owner or no stake, or when the key was retired longer ago than `UNBONDING`.
    function bookSlash(
        address hotKey,
        address token,
        uint128 amount,
        address victim,
        address reporter,
        bytes32 cause
    ) external returns (uint256 slashId, uint128 booked);

    /// @notice Module only: retires `hotKey` for ever. True the first time; a key is convicted once.
    function convict(address hotKey, bytes32 cause) external returns (bool first);

    function stakeOf(address owner, address token) external view returns (Stake memory);

    /// @notice Stake that can neither be withdrawn nor held: penalties of open jobs plus the share locked by earnings.
    function lockedStake(address owner, address token) external view returns (uint256);

    function slash(uint256 slashId) external view returns (Slash memory);

    function capabilityOf(address hotKey) external view returns (Capability memory);

    function isConvicted(address hotKey) external view returns (bool);

    /// @notice Whether `hotKey` must not begin new work: convicted, or registered once and not active now.
    function isRetired(address hotKey) external view returns (bool);

    /// @notice Where earnings of `hotKey` are paid: its payout address, or the key itself when it was never registered.
    function payoutOf(address hotKey) external view returns (address);

    /// @notice Owner of an active or retired key; zero when it was never registered.
    function ownerOf(address hotKey) external view returns (address);

    function isActive(address hotKey) external view returns (bool);

    function worker(address hotKey) external view returns (Worker memory);

    function domainSeparator() external view returns (bytes32);

    /// @notice The digest a hot key signs to consent.
    function hotKeyDigest(address owner, address hotKey, address payout, uint256 nonce, uint40 deadline)
        external
        view
        returns (bytes32);
}
