// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {MessageHashUtils} from "@openzeppelin/contracts/utils/cryptography/MessageHashUtils.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {IChannels} from "./interfaces/IChannels.sol";
import {IDisputes} from "./interfaces/IDisputes.sol";
import {IJobs} from "./interfaces/IJobs.sol";
import {IResolver} from "./interfaces/IResolver.sol";
import {IVault} from "./interfaces/IVault.sol";
import {IWorkers} from "./interfaces/IWorkers.sol";

contract Disputes is IDisputes, ReentrancyGuardTransient {
    bytes32 private constant RECEIPT_TYPE = keccak256(
        "Receipt(bytes32 jobId,uint32 part,bytes32 channelId,uint64 sequence,bytes32 modelId,bytes32 requestHash,bytes32 paramsHash,bytes32 outputDigest,uint32 inputTokens,uint32 outputTokens,uint128 cost,bytes32 commitment,uint64 started,uint64 finished,uint8 finishReason)"
    );

    uint256 public constant BOND_PPM = 100_000;
    uint40 public constant RESOLVE_WINDOW = 14 days;
    uint256 public constant BEGIN_GAS = 400_000;
    uint256 public constant OUTCOME_GAS = 100_000;
    uint256 private constant PPM = 1_000_000;
    /// @dev What stands between the check and the call: a cold account (2,600) and a few operations.
    uint256 private constant CALL_MARGIN = 10_000;

    IVault public immutable vault;
    IWorkers public immutable workers;
    IJobs public immutable jobs;
    IChannels public immutable channels;

    mapping(bytes32 jobId => Dispute) private _disputes;
    /// @dev Once per key and token: a first proof in a token without stake must not shelter the stake in the others.
    mapping(address hotKey => mapping(address token => bool)) private _proven;

    constructor(IVault vault_, IWorkers workers_, IJobs jobs_, IChannels channels_) {
        if (address(vault_).code.length == 0) revert Disputes_NotAContract(address(vault_));
        if (address(workers_).code.length == 0) revert Disputes_NotAContract(address(workers_));
        if (address(jobs_).code.length == 0) revert Disputes_NotAContract(address(jobs_));
        if (address(channels_).code.length == 0) revert Disputes_NotAContract(address(channels_));
        vault = vault_;
        workers = workers_;
        jobs = jobs_;
        channels = channels_;
    }

    /// @inheritdoc IDisputes
    function proveEquivocation(
        IChannels.ChannelConfig calldata config,
        Receipt calldata first,
        bytes calldata firstSignature,
        Receipt calldata second,
        bytes calldata secondSignature
    ) external returns (uint256 slashId) {
        bytes32 id = channels.channelIdOf(config);
        bytes32 one = receiptDigest(first);
        bytes32 other = receiptDigest(second);
        if (first.channelId != id || second.channelId != id || first.sequence != second.sequence || one == other) {
            revert Disputes_NoEquivocation();
        }
        _requireKey(config.receiver, one, firstSignature);
        _requireKey(config.receiver, other, secondSignature);
        if (_proven[config.receiver][config.token]) revert Disputes_ConvictedBefore(config.receiver);

        _proven[config.receiver][config.token] = true;
        workers.convict(config.receiver, other);
        // As much as the cap of a verdict allows.
        (slashId,) = workers.bookSlash(
            config.receiver, config.token, type(uint128).max, config.payer, msg.sender, other
        );

        emit Equivocated(config.receiver, id, first.sequence, one, other, slashId);
    }

    /// @inheritdoc IDisputes
    function open(IJobs.Quote calldata quote, bytes32 evidence) external nonReentrant {
        bytes32 jobId = jobs.jobIdOf(quote);
        if (msg.sender != quote.client) revert Disputes_NotClient(jobId, msg.sender);
        if (quote.resolver == address(0)) revert Disputes_NoResolver(jobId);
        // Only a submitted job within its window gets past this line, and only once.
        IJobs.Job memory job = jobs.dispute(quote);

        uint128 bond = bondFor(quote);
        uint40 resolveBy = uint40(block.timestamp) + RESOLVE_WINDOW;
        _disputes[jobId] = Dispute(bond, resolveBy, false, IResolver.Outcome.None, 0);
        vault.lockBond(quote.token, quote.client, bond);

        // Last, with everything in place: the resolver is a stranger. Whether it took the case changes nothing here.
        bool took = _begin(
            quote.resolver, abi.encodeCall(IResolver.begin, (jobId, quote.specHash, job.resultHash, evidence))
        );
        emit DisputeOpened(jobId, quote.resolver, bond, resolveBy, evidence, took);
    }

    /// @inheritdoc IDisputes
    function resolve(IJobs.Quote calldata quote) external nonReentrant {
        bytes32 jobId = jobs.jobIdOf(quote);
        Dispute storage record = _disputes[jobId];
        if (record.resolveBy == 0) revert Disputes_NoDispute(jobId);
        if (record.ended) revert Disputes_Ended(jobId);
        IResolver.Outcome outcome = _outcome(quote.resolver, jobId);
        bool silent = outcome == IResolver.Outcome.None;
        if (silent && block.timestamp < record.resolveBy) revert Disputes_Undecided(jobId, record.resolveBy);

        uint128 bond = record.bond;
        uint128 fee = silent ? 0 : bond / 2;
        record.bond = 0;
        record.ended = true;
        record.outcome = outcome;
        record.fee = fee;

        uint128 claimed = jobs.job(jobId).claimed;
        bool rejected = outcome == IResolver.Outcome.Reject;
        bool accepted = outcome == IResolver.Outcome.Accept;
        uint128 toWorker = accepted ? 0 : rejected ? claimed : claimed / 2;
        emit DisputeResolved(jobId, outcome, toWorker, rejected ? 0 : bond - fee, fee);

        jobs.resolve(quote, toWorker, accepted);
        if (fee > 0) vault.release(quote.token, quote.resolver, fee);
        vault.release(quote.token, rejected ? workers.payoutOf(quote.worker) : quote.client, bond - fee);
    }

    /// @inheritdoc IDisputes
    function disputeOf(bytes32 jobId) external view returns (Dispute memory) {
        return _disputes[jobId];
    }

    /// @inheritdoc IDisputes
    function bondFor(IJobs.Quote calldata quote) public pure returns (uint128) {
        uint256 bond = (uint256(quote.amount) * BOND_PPM + PPM - 1) / PPM;
        return bond == 0 ? 1 : uint128(bond);
    }

    /// @inheritdoc IDisputes
    function receiptDigest(Receipt calldata receipt) public view returns (bytes32) {
        return MessageHashUtils.toTypedDataHash(
            channels.domainSeparator(), keccak256(abi.encode(RECEIPT_TYPE, receipt))
        );
    }

    /// @dev By the key itself: what a contract says today convicts nobody, because it can say something else tomorrow.
    function _requireKey(address signer, bytes32 digest, bytes calldata signature) private pure {
        (address recovered, ECDSA.RecoverError error_,) = ECDSA.tryRecoverCalldata(digest, signature);
        if (error_ != ECDSA.RecoverError.NoError || recovered != signer) revert Disputes_BadSignature(signer);
    }

    /// @dev A call passes on at most 63/64 of the gas that is left (EIP-150). Without this check the loser of a case would
    /// send just too little, and the resolver would seem to be silent.
    function _requireGas(uint256 forwarded) private view {
        uint256 needed = forwarded + forwarded / 63 + CALL_MARGIN;
        if (gasleft() < needed) revert Disputes_NotEnoughGas(gasleft(), needed);
    }

    function _begin(address resolver, bytes memory data) private returns (bool took) {
        if (resolver.code.length == 0) return false;
        _requireGas(BEGIN_GAS);
        uint256 forwarded = BEGIN_GAS;
        // By hand: no byte of the answer is copied, so a long one costs the resolver's gas and not ours.
        assembly ("memory-safe") {
            took := call(forwarded, resolver, 0, add(data, 0x20), mload(data), 0, 0)
        }
    }

    /// @dev Anything but one of the three words is None: a revert, no code, a short or a wild answer.
    function _outcome(address resolver, bytes32 jobId) private view returns (IResolver.Outcome) {
        bytes memory data = abi.encodeCall(IResolver.outcome, (jobId));
        _requireGas(OUTCOME_GAS);
        uint256 forwarded = OUTCOME_GAS;
        uint256 word;
        assembly ("memory-safe") {
            mstore(0, 0)
            let answered := staticcall(forwarded, resolver, add(data, 0x20), mload(data), 0, 0x20)
            if and(answered, gt(returndatasize(), 0x1f)) { word := mload(0) }
        }
        return word > uint256(type(IResolver.Outcome).max) ? IResolver.Outcome.None : IResolver.Outcome(word);
    }
}
