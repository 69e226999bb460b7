// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title One-way payment channels with cumulative vouchers
/// @notice A payer allocates vault balance to a channel by a signature that anyone may submit. Its session key signs
/// vouchers, each for the total of the channel's life; the receiver claims the newest one. What is not claimed goes back
/// to the payer after `withdrawDelay`, or at once when the receiver signs.
/// Signatures: 65 bytes r || s || v with low s by the key itself, or ERC-1271 when the signer has code. EIP-712 domain:
/// {name "Gristmill", version "1", chainId, verifyingContract}. Struct strings of ChannelConfig and Voucher are those of
/// x402 `batch-settlement`.
interface IChannels {
    /// @param payer Owner of the vault balance; signs Allocation.
    /// @param payerAuthorizer Session key; signs Voucher.
    /// @param receiver The worker's hot key; Workers knows where its money goes.
    /// @param receiverAuthorizer Signs Close; zero means no cooperative close.
    /// @param withdrawDelay Seconds between `initiateWithdraw` and `finalizeWithdraw`.
    struct ChannelConfig {
        address payer;
        address payerAuthorizer;
        address receiver;
        address receiverAuthorizer;
        address token;
        uint40 withdrawDelay;
        bytes32 salt;
    }

    /// @param allocated Total ever allocated; from closing on, what was claimed of it.
    /// @param claimed Total ever claimed; never above `allocated`, never falls.
    /// @param withdrawAt Time from which the payer's withdrawal may be finalized; zero when none has begun.
    /// @param closed Final: no money is in the channel and none can come.
    struct Channel {
        uint128 allocated;
        uint128 claimed;
        uint40 withdrawAt;
        bool closed;
    }

    /// @param amount The claimed total the receiver asks for: what its receipts add up to.
    /// @param maxClaimableAmount The voucher's ceiling; `amount` may be less, because the payer signs ahead by a tick.
    /// @param signature By `payerAuthorizer` over Voucher{channelId, maxClaimableAmount}.
    struct ClaimEntry {
        ChannelConfig config;
        uint128 amount;
        uint128 maxClaimableAmount;
        bytes signature;
    }

    /// @notice Why an entry of a batch was passed over.
    enum SkipReason {
        None,
        Closed,
        NotHigher,
        OverAllocated,
        BadSignature,
        OverVoucher
    }

    error Channels_ZeroAddress();
    error Channels_NotAContract(address account);
    error Channels_DelayOutOfRange(uint40 delay);
    error Channels_Expired(uint40 validBefore, uint256 now_);
    error Channels_Closed(bytes32 channelId);
    error Channels_Unknown(bytes32 channelId);
    error Channels_NotHigher(bytes32 channelId, uint128 current, uint128 given);
    error Channels_WithdrawPending(bytes32 channelId, uint40 withdrawAt);
    error Channels_NoWithdraw(bytes32 channelId);
    error Channels_TooEarly(bytes32 channelId, uint40 withdrawAt, uint256 now_);
    error Channels_NotPayer(bytes32 channelId, address caller);
    error Channels_BadSignature(bytes32 channelId, address signer);
    error Channels_BatchSize(uint256 entries);
    error Channels_NothingOwed(address receiver, address token);
    error Channels_BelowClaimed(bytes32 channelId, uint128 claimed, uint128 given);
    error Channels_OverVoucher(bytes32 channelId, uint128 voucher, uint128 given);
    error Channels_OverAllocated(bytes32 channelId, uint128 allocated, uint128 given);

    event Allocated(
        bytes32 indexed channelId,
        address indexed payer,
        address indexed receiver,
        ChannelConfig config,
        uint128 allocated,
        uint128 added
    );
    event Claimed(
        bytes32 indexed channelId, address indexed receiver, address indexed token, uint128 claimed, uint128 added
    );
    event ClaimSkipped(bytes32 indexed channelId, SkipReason reason);
    event Settled(address indexed receiver, address indexed token, address indexed payout, uint256 amount);
    event WithdrawInitiated(bytes32 indexed channelId, address indexed by, uint40 withdrawAt);
    event Withdrawn(bytes32 indexed channelId, address indexed payer, uint128 returned);
    event Closed(bytes32 indexed channelId, uint128 claimed, uint128 paid, uint128 returned);

    /// @notice Raises the channel's total to `allocated` out of the payer's vault balance. Anyone may submit.
    /// @param allocated Total over the channel's life, so a replay changes nothing.
    /// @param signature By `payer` over Allocation{channelId, allocated, validBefore}.
    function allocate(ChannelConfig calldata config, uint128 allocated, uint40 validBefore, bytes calldata signature)
        external;

    /// @notice Raises the claimed total of 1 to 400 channels to each entry's `amount`, under the newest voucher. Anyone
    /// may submit. A bad entry emits `ClaimSkipped` and does not touch the others. Money is owed until `settle`.
    /// Warning: whoever holds a voucher chooses `amount`; up to the ceiling that the payer signed, nobody else can object.
    /// Warning: an ERC-1271 authorizer gets at most 100,000 gas to answer and its "no" may be a "yes" tomorrow: a worker
    /// must not rely on such a voucher before the claim is mined.
    /// @return added Total newly claimed over all entries and tokens, for dry runs.
    function claim(ClaimEntry[] calldata entries) external returns (uint256 added);

    /// @notice Moves everything owed to `receiver` to the vault balance of its payout address. Anyone may call.
    function settle(address receiver, address token) external;

    /// @notice Payer or session key: starts the delay after which the unclaimed rest returns to the payer. Claims stay
    /// possible until the channel is closed; new allocations do not.
    /// Warning: a receiver that does not claim its newest voucher within `withdrawDelay` loses it.
    function initiateWithdraw(ChannelConfig calldata config) external;

    /// @notice After the delay: returns the unclaimed rest to the payer's vault balance and closes. Anyone may call.
    function finalizeWithdraw(ChannelConfig calldata config) external;

    /// @notice Ends a channel at once with the receiver's consent: pays up to `finalAmount`, returns the rest. Anyone
    /// may submit.
    /// Warning: a Close never expires. Whoever holds one ends the channel with it at any later time, and the receiver loses
    /// the vouchers above `finalAmount`: sign it last, for all that was earned.
    /// Warning: `receiverAuthorizer` signs for the receiver, and the payer wrote it into the config: a receiver that serves a
    /// channel with another's key in this place can be closed out at what it has claimed.
    /// @param finalAmount Total claimed at the end. Above the present total it needs a voucher for at least as much.
    /// @param voucherAmount Amount of that voucher; not read when `finalAmount` is already claimed.
    /// @param closeSignature By `receiverAuthorizer` over Close{channelId, claimed: finalAmount}.
    function close(
        ChannelConfig calldata config,
        uint128 finalAmount,
        uint128 voucherAmount,
        bytes calldata voucherSignature,
        bytes calldata closeSignature
    ) external;

    function channel(bytes32 channelId) external view returns (Channel memory);

    /// @notice Claimed and not yet settled.
    function owed(address receiver, address token) external view returns (uint256);

    /// @notice EIP-712 digest of the config: chain and contract are part of a channel's name.
    function channelIdOf(ChannelConfig calldata config) external view returns (bytes32);

    function domainSeparator() external view returns (bytes32);

    function voucherDigest(bytes32 channelId, uint128 maxClaimableAmount) external view returns (bytes32);

    function allocationDigest(bytes32 channelId, uint128 allocated, uint40 validBefore) external view returns (bytes32);

    function closeDigest(bytes32 channelId, uint128 claimed) external view returns (bytes32);
}
