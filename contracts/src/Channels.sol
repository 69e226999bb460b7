// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {Signatures} from "./Signatures.sol";
import {IChannels} from "./interfaces/IChannels.sol";
import {IVault} from "./interfaces/IVault.sol";
import {IWorkers} from "./interfaces/IWorkers.sol";

contract Channels is IChannels, EIP712 {
    using Signatures for address;

    bytes32 private constant CONFIG_TYPE = keccak256(
        "ChannelConfig(address payer,address payerAuthorizer,address receiver,address receiverAuthorizer,address token,uint40 withdrawDelay,bytes32 salt)"
    );
    bytes32 private constant VOUCHER_TYPE = keccak256("Voucher(bytes32 channelId,uint128 maxClaimableAmount)");
    bytes32 private constant ALLOCATION_TYPE =
        keccak256("Allocation(bytes32 channelId,uint128 allocated,uint40 validBefore)");
    bytes32 private constant CLOSE_TYPE = keccak256("Close(bytes32 channelId,uint128 claimed)");

    uint40 public constant MIN_WITHDRAW_DELAY = 15 minutes;
    uint40 public constant MAX_WITHDRAW_DELAY = 30 days;
    uint256 public constant MAX_BATCH = 400;

    IVault public immutable vault;
    IWorkers public immutable workers;

    mapping(bytes32 channelId => Channel) private _channels;
    /// @inheritdoc IChannels
    mapping(address receiver => mapping(address token => uint256)) public owed;

    constructor(IVault vault_, IWorkers workers_) EIP712("Gristmill", "1") {
        if (address(vault_).code.length == 0) revert Channels_NotAContract(address(vault_));
        if (address(workers_).code.length == 0) revert Channels_NotAContract(address(workers_));
        vault = vault_;
        workers = workers_;
    }

    /// @inheritdoc IChannels
    function allocate(ChannelConfig calldata config, uint128 allocated, uint40 validBefore, bytes calldata signature)
        external
    {
        if (config.payerAuthorizer == address(0) || config.receiver == address(0)) revert Channels_ZeroAddress();
        if (config.withdrawDelay < MIN_WITHDRAW_DELAY || config.withdrawDelay > MAX_WITHDRAW_DELAY) {
            revert Channels_DelayOutOfRange(config.withdrawDelay);
        }
        if (block.timestamp >= validBefore) revert Channels_Expired(validBefore, block.timestamp);
        bytes32 id = channelIdOf(config);
        Channel storage state = _channels[id];
        if (state.closed) revert Channels_Closed(id);
        // A worker that sees a fresh allocation may rely on the whole delay being ahead of it.
        if (state.withdrawAt != 0) revert Channels_WithdrawPending(id, state.withdrawAt);
        uint128 current = state.allocated;
        if (allocated <= current) revert Channels_NotHigher(id, current, allocated);
        _requireSigner(id, config.payer, allocationDigest(id, allocated, validBefore), signature);

        state.allocated = allocated;

        uint128 added = allocated - current;
        emit Allocated(id, config.payer, config.receiver, config, allocated, added);

        vault.lock(config.token, config.payer, added);
    }

    /// @inheritdoc IChannels
    function claim(ClaimEntry[] calldata entries) external returns (uint256 added) {
        if (entries.length == 0 || entries.length > MAX_BATCH) revert Channels_BatchSize(entries.length);
        for (uint256 i = 0; i < entries.length; ++i) {
            added += _claim(entries[i]);
        }
    }

    /// @inheritdoc IChannels
    function settle(address receiver, address token) external {
        uint256 amount = owed[receiver][token];
        if (amount == 0) revert Channels_NothingOwed(receiver, token);

        owed[receiver][token] = 0;

        address payout = workers.payoutOf(receiver);
        emit Settled(receiver, token, payout, amount);

        workers.lockForEarnings(receiver, token, amount);
        vault.release(token, payout, amount);
    }

    /// @inheritdoc IChannels
    function initiateWithdraw(ChannelConfig calldata config) external {
        (bytes32 id, Channel storage state) = _open(config);
        if (msg.sender != config.payer && msg.sender != config.payerAuthorizer) {
            revert Channels_NotPayer(id, msg.sender);
        }
        if (state.withdrawAt != 0) revert Channels_WithdrawPending(id, state.withdrawAt);

        uint40 withdrawAt = uint40(block.timestamp) + config.withdrawDelay;
        state.withdrawAt = withdrawAt;

        emit WithdrawInitiated(id, msg.sender, withdrawAt);
    }

    /// @inheritdoc IChannels
    function finalizeWithdraw(ChannelConfig calldata config) external {
        (bytes32 id, Channel storage state) = _open(config);
        uint40 withdrawAt = state.withdrawAt;
        if (withdrawAt == 0) revert Channels_NoWithdraw(id);
        if (block.timestamp < withdrawAt) revert Channels_TooEarly(id, withdrawAt, block.timestamp);

        uint128 claimed = state.claimed;
        uint128 rest = state.allocated - claimed;
        state.allocated = claimed;
        state.closed = true;

        emit Withdrawn(id, config.payer, rest);

        _release(config.token, config.payer, rest);
    }

    /// @inheritdoc IChannels
    function close(
        ChannelConfig calldata config,
        uint128 finalAmount,
        uint128 voucherAmount,
        bytes calldata voucherSignature,
        bytes calldata closeSignature
    ) external {
        (bytes32 id, Channel storage state) = _open(config);
        uint128 claimed = state.claimed;
        uint128 allocated = state.allocated;
        if (finalAmount < claimed) revert Channels_BelowClaimed(id, claimed, finalAmount);
        if (finalAmount > allocated) revert Channels_OverAllocated(id, allocated, finalAmount);
        if (finalAmount > claimed) {
            if (finalAmount > voucherAmount) revert Channels_OverVoucher(id, voucherAmount, finalAmount);
            _requireSigner(id, config.payerAuthorizer, voucherDigest(id, voucherAmount), voucherSignature);
        }
        _requireSigner(id, config.receiverAuthorizer, closeDigest(id, finalAmount), closeSignature);

        state.claimed = finalAmount;
        state.allocated = finalAmount;
        state.closed = true;

        emit Closed(id, finalAmount, finalAmount - claimed, allocated - finalAmount);

        // Lets the receiver's stake answer for what it earns here as for what it settles: closing is no way around.
        if (finalAmount > claimed) workers.lockForEarnings(config.receiver, config.token, finalAmount - claimed);
        _release(config.token, workers.payoutOf(config.receiver), finalAmount - claimed);
        _release(config.token, config.payer, allocated - finalAmount);
    }

    /// @inheritdoc IChannels
    function channel(bytes32 channelId) external view returns (Channel memory) {
        return _channels[channelId];
    }

    /// @inheritdoc IChannels
    function channelIdOf(ChannelConfig calldata config) public view returns (bytes32) {
        return _hashTypedDataV4(keccak256(abi.encode(CONFIG_TYPE, config)));
    }

    /// @inheritdoc IChannels
    function domainSeparator() external view returns (bytes32) {
        return _domainSeparatorV4();
    }

    /// @inheritdoc IChannels
    function voucherDigest(bytes32 channelId, uint128 maxClaimableAmount) public view returns (bytes32) {
        return _hashTypedDataV4(keccak256(abi.encode(VOUCHER_TYPE, channelId, maxClaimableAmount)));
    }

    /// @inheritdoc IChannels
    function allocationDigest(bytes32 channelId, uint128 allocated, uint40 validBefore) public view returns (bytes32) {
        return _hashTypedDataV4(keccak256(abi.encode(ALLOCATION_TYPE, channelId, allocated, validBefore)));
    }

    /// @inheritdoc IChannels
    function closeDigest(bytes32 channelId, uint128 claimed) public view returns (bytes32) {
        return _hashTypedDataV4(keccak256(abi.encode(CLOSE_TYPE, channelId, claimed)));
    }

    function _claim(ClaimEntry calldata entry) private returns (uint128 added) {
        ChannelConfig calldata config = entry.config;
        uint128 amount = entry.amount;
        uint128 ceiling = entry.maxClaimableAmount;
        bytes32 id = channelIdOf(config);
        Channel storage state = _channels[id];
        uint128 claimed = state.claimed;

        // A closed channel has allocated == claimed, so no amount fits between: the slot of `closed` stays unread, and
        // with it 2,100 gas an entry, unless the answer is no.
        SkipReason reason;
        if (amount <= claimed) reason = state.closed ? SkipReason.Closed : SkipReason.NotHigher;
        else if (amount > state.allocated) reason = state.closed ? SkipReason.Closed : SkipReason.OverAllocated;
        else if (amount > ceiling) reason = SkipReason.OverVoucher;
        else if (!config.payerAuthorizer.isValid(voucherDigest(id, ceiling), entry.signature)) {
            reason = SkipReason.BadSignature;
        }
        if (reason != SkipReason.None) {
            emit ClaimSkipped(id, reason);
            return 0;
        }

        added = amount - claimed;
        state.claimed = amount;
        owed[config.receiver][config.token] += added;

        emit Claimed(id, config.receiver, config.token, amount, added);
    }

    /// @dev A channel that holds or held money and is not closed.
    function _open(ChannelConfig calldata config) private view returns (bytes32 id, Channel storage state) {
        id = channelIdOf(config);
        state = _channels[id];
        if (state.closed) revert Channels_Closed(id);
        if (state.allocated == 0) revert Channels_Unknown(id);
    }

    function _requireSigner(bytes32 id, address signer, bytes32 digest, bytes calldata signature) private view {
        if (!signer.isValid(digest, signature)) revert Channels_BadSignature(id, signer);
    }

    function _release(address token, address to, uint128 amount) private {
        if (amount > 0) vault.release(token, to, amount);
    }
}
